"""Training state: all that a run continues from, in one of two encodings.

``OneFile`` is a safetensors file that one process writes; ``Shards`` (shards.py) is a folder of
torch.distributed.checkpoint, of which every process of a job writes and reads its part. A model
is an export of the state, never a part of it.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.errors import InputError
from ..common.sharded_tensor import is_sharded
from .hf import _open, _save_tensors
from .step_folders import TEMPORARY

STATE_FILE = "training_state.safetensors"

METADATA_FILE = ".metadata"  # written last: a folder without it is no checkpoint

PARAMETER = "parameter."  # before a parameter's name; exp_avg. and exp_avg_sq. before its moments'


class UnwrittenError(InputError):
    """The disk took no more of a state."""


class TrainingState(NamedTuple):
    """Parameters and moments by their names, the steps done, and those whose update was skipped."""

    tensors: Mapping[str, Tensor]
    step: int
    skipped: Sequence[int]


class Encoding(Protocol):
    """A training state in a folder."""

    path: Path  # what an error names

    def notes(self) -> tuple[int, list[int]]:
        """Return the number of steps done and the steps skipped."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor, without reading them."""
        ...

    def read_whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors whole, in this process alone."""
        ...

    def read_like(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors laid out as ``like``; every process of a job calls this."""
        ...


def stored_in(folder: Path) -> Encoding:
    """Return the state that a checkpoint's folder holds, whichever way it was written."""
    if not (folder / METADATA_FILE).is_file():
        return OneFile(folder)
    from .shards import Shards  # imports torch.distributed.checkpoint, for 0.2 s

    return Shards(folder)


def load_state(folder: Path) -> TrainingState:
    """Return the whole state that a checkpoint's folder holds."""
    stored = stored_in(folder)
    step, skipped = stored.notes()
    return TrainingState(stored.read_whole(stored.shapes()), step, skipped)


class OneFile:
    """A training state as one safetensors file, its notes in the metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / STATE_FILE

    def write(self, state: TrainingState) -> None:
        """Write a state, from one process."""
        notes = {"step": str(state.step), "skipped": json.dumps(list(state.skipped))}
        _save_tensors(self.path, state.tensors, notes)

    def notes(self) -> tuple[int, list[int]]:
        """Return the number of steps done and the steps skipped."""
        with _open(self.path) as file:
            notes = file.metadata() or {}
        if not notes.get("step", "").isdigit():
            raise InputError(
                f"{self.path}: names no step, so it is not a training state of this package"
            )
        return int(notes["step"]), json.loads(notes.get("skipped", "[]"))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor, without reading them."""
        with _open(self.path) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read_whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors whole, in this process alone."""
        with _open(self.path) as file:
            return {name: file.get_tensor(name) for name in names}

    def read_like(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors laid out as ``like``; every process of a job calls this.

        Shards are taken out of a copy in the other encoding, which does not remain.
        """
        if not any(map(is_sharded, like.values())):
            return self.read_whole(like)
        from .shards import Shards

        copy = Shards(self.folder.with_name(f"{self.folder.name}.shards{TEMPORARY}"))
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first:
            copy.write(self.read_whole(like), alone=True)
        _barrier()
        tensors = copy.read_like(like)
        _barrier()
        if is_first:
            shutil.rmtree(copy.folder, ignore_errors=True)
        return tensors


def _barrier() -> None:
    """Wait for every process, and for no GPU."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
