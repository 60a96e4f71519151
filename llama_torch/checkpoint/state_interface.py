"""Training state, from which a run continues, and the interface of its two encodings.

``single_file`` writes it as one safetensors file, from one process; ``shards`` as a folder of
torch.distributed.checkpoint, of which every process writes its own shards. ``training_state``
opens either. The model file of a run is an export of the state and no part of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from llama_common.errors import InputError

from ..common.state_file import abridged, require_count

COPY_AGAIN = "copy the checkpoint again"

PARAMETER = "parameter."  # before a parameter's name; exp_avg. and exp_avg_sq. before its moments'


class UnwrittenError(InputError):
    """Writing a training state failed, as on a full disk."""


class TrainingState(NamedTuple):
    """Parameters and Adam's moments by name, and a run's progress."""

    tensors: Mapping[str, Tensor]
    step: int  # the number of steps done
    skipped: Sequence[int]  # steps, from 1, whose update was skipped


def check_steps(step: Any, skipped: Any) -> tuple[int, list[int]]:
    """Return the number of steps done, and the steps skipped, from 1 to it and ascending.

    Raises ValueError for other values: Adam's count of updates is their difference.
    """
    step = require_count("step", step)
    if not isinstance(skipped, list):
        raise ValueError(f"skipped is {abridged(skipped)}")
    before = 0
    for number in skipped:
        if type(number) is not int or not before < number <= step:
            raise ValueError(f"skipped holds {abridged(number)}, after {before} and at step {step}")
        before = number
    return step, skipped


def require_float32(path: Path, name: str, found: object, float32: object) -> None:
    """Raise InputError for a tensor of another type than every state has: it is not converted."""
    if found != float32:
        raise InputError(
            f"{path}: {name} is stored as {found}, and a training state is float32; {COPY_AGAIN}"
        )


class StateReader(Protocol):
    """A training state on disk. Every method raises InputError for files that cannot be read."""

    path: Path  # the file or folder, for error messages

    def metadata(self) -> tuple[int, list[int]]:
        """Return the number of steps done, and the steps whose update was skipped."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name, from the headers alone."""
        ...

    def read_whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors unsharded, on the CPU; without collective calls."""
        ...

    def read_like(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with the names and the placements (sharding) of ``like``.

        Collective where ``like`` is sharded: every process of the job calls it.
        """
        ...
