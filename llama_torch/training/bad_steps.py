"""Find bad training steps: a loss or gradient that is not finite, or a loss that has exploded."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..distributed.parallel import Parallel

# A loss above this many times ln(vocab_size) has exploded. ln(vocab_size) is the loss of a uniform
# prediction, where training begins; only confident wrong predictions give three times as much.
EXPLODED = 3.0
# After this many bad steps in a row the weights are bad, and skipping would never end.
IN_A_ROW = 10


def largest_loss(vocab_size: int, z_loss: float) -> float:
    """Return the largest loss, in nats per token, of a step that has not exploded."""
    cross_entropy = EXPLODED * math.log(vocab_size)
    return cross_entropy + z_loss * cross_entropy**2


class BadSteps:
    """Checks every training step's loss and gradient norm.

    On a CPU, or with --skip-bad-steps, they are checked before the update, and a bad step is not
    taken. On a GPU, where that would wait for the device, the first bad step is recorded on the
    device and raised by the next ``raise_if_bad``. The weights are spoiled from it on, so
    ``raise_if_bad`` is called before anything is saved.

    ``max_loss`` is in nats per token; ``describe_step`` names the windows of a step counted from
    0, for the error's message; the numbers of skipped steps, from 1, are appended to ``skipped``.
    """

    def __init__(
        self,
        max_loss: float,
        device: torch.device,
        describe_step: Callable[[int], str],
        skipped: list[int],
        *,
        skips: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        self.max_loss, self.describe_step = max_loss, describe_step
        self.skipped, self.skips = skipped, skips
        self.parallel = parallel or Parallel()
        self.checks_before_update = device.type == "cpu" or skips
        self.first_bad = torch.zeros(3, dtype=torch.float64, device=device)  # step, loss, norm

    def accept(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Return whether training step ``step`` (from 1) may be taken.

        ``loss`` (float64) and ``norm`` are scalars, the same on all processes. Raises InputError,
        on the main process, for a bad step that ends the run.
        """
        with self.parallel.errors_on_main_only():
            return self._accept(step, loss, norm)

    def _accept(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        good = loss.isfinite() & norm.isfinite() & (loss <= self.max_loss)
        if not self.checks_before_update:
            this = torch.stack([loss.new_full((), step), loss, norm.double()])
            is_kept = good | (self.first_bad[0] > 0)
            self.first_bad = torch.where(is_kept, self.first_bad, this)
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

    def raise_if_bad(self) -> None:
        """Raise InputError if a bad training step has been taken; waits for the GPU."""
        if self.checks_before_update:
            return
        step, loss, norm = self.first_bad.tolist()
        with self.parallel.errors_on_main_only():
            if step:
                raise self._error(int(step), loss, norm)

    def _error(self, step: int, loss: float, norm: float) -> InputError:
        limit = f" (at most {self.max_loss:.4g} is sane)" if math.isfinite(self.max_loss) else ""
        return InputError(
            f"step {step} is bad: its loss is {loss:.4g}{limit}, its gradient norm {norm:.4g}; it "
            f"read {self.describe_step(step - 1)}; lower --lr, or pass over it with --resume "
            "--skip-bad-steps (the last checkpoint stands)"
        )
