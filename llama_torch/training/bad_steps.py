"""Steps that must not be taken: a loss or a gradient that is not finite, a loss that explodes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common.errors import InputError
from ..distributed.parallel import Parallel

# A loss above this many times ln(vocabulary) has exploded. ln(vocabulary) is what a uniform guess
# costs and where training begins; only a model that is sure of what is wrong costs thrice that.
EXPLODED = 3.0
# So many bad steps in a row are the weights' doing, and passing over them would never end.
IN_A_ROW = 10


def largest_loss(vocab_size: int, z_loss: float) -> float:
    """Return the largest loss, in nats per token, of a step that has not exploded."""
    most = EXPLODED * math.log(vocab_size)
    return most + z_loss * most**2


class BadSteps:
    """Looks at the loss and the gradient norm of every step before its update.

    Where that waits for nothing (on a CPU) or was asked for (--skip-bad-steps), a bad step is
    not taken. Else, on a GPU, the first bad step is noted there and found by the next ``look``:
    what was trained since is spoiled, so look before anything is saved.
    """

    def __init__(
        self,
        most: float,
        device: torch.device,
        windows: Callable[[int], str],
        skipped: list[int],
        *,
        skips: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        self.most, self.windows, self.skipped, self.skips = most, windows, skipped, skips
        self.waits, self.parallel = device.type == "cpu", parallel or Parallel()
        self.noted = torch.zeros(3, dtype=torch.float64, device=device)  # step, loss, norm

    def accept(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Return whether step ``step`` (from 1) may be taken; raise InputError to end the run.

        All processes come to the same; the first one's error says why they end.
        """
        with self.parallel.errors_on_main_only():
            return self._accept(step, loss, norm)

    def _accept(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        good = loss.isfinite() & norm.isfinite() & (loss <= self.most)
        if not (self.skips or self.waits):
            now = torch.stack([loss.new_full((), step), loss, norm.double()])
            self.noted = torch.where(good | (self.noted[0] > 0), self.noted, now)
            return True
        if good:
            return True
        if not self.skips:
            raise self._error(step, loss.item(), norm.item())
        self.skipped.append(step)
        if self.skipped[-IN_A_ROW:] == list(range(step - IN_A_ROW + 1, step + 1)):
            raise InputError(
                f"{IN_A_ROW} bad steps in a row, the last of them step {step} with loss "
                f"{loss.item():.4g}: the weights are bad, not the text; lower --lr, or delete the "
                "newest checkpoint to continue from the one before"
            )
        return False

    def look(self) -> None:
        """Raise InputError if a step since the start was bad and has been taken."""
        step, loss, norm = self.noted.tolist() if not self.waits else (0, 0.0, 0.0)
        with self.parallel.errors_on_main_only():
            if step:
                raise self._error(int(step), loss, norm)

    def _error(self, step: int, loss: float, norm: float) -> InputError:
        return InputError(
            f"step {step} is bad: its loss is {loss:.4g} (at most {self.most:.4g} is sane), its "
            f"gradient norm {norm:.4g}; it read {self.windows(step - 1)}; lower --lr, or pass over "
            "it with --resume --skip-bad-steps (the last checkpoint stands)"
        )
