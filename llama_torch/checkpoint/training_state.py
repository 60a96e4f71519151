"""Training state: all that a run continues from, in one of two encodings.

``OneFile`` is a safetensors file that one process writes; ``Shards`` is a folder of
torch.distributed.checkpoint, of which every process of a job writes and reads its part. A model
is an export of the state, never a part of it.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..common.errors import InputError
from ..common.files import read_json, write_text
from .hf import _open, _save_tensors
from .step_folders import TEMPORARY

STATE_FILE = "training_state.safetensors"

NOTES_FILE = "state.json"

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
    return Shards(folder) if (folder / METADATA_FILE).is_file() else OneFile(folder)


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
        if not any(isinstance(tensor, DTensor) for tensor in like.values()):
            return self.read_whole(like)
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


class Shards:
    """A training state as a folder of shards, with its notes in a JSON file beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.path = folder

    def write(self, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
        """Write the tensors; every process of the job calls this, each with its own shards.

        ``alone``: one process has them whole, and the others know nothing of it.
        """
        is_alone = alone or not dist.is_initialized()
        try:
            dcp.save(dict(tensors), checkpoint_id=self.folder, no_dist=is_alone)
        except (CheckpointException, OSError) as error:
            raise UnwrittenError(_unwritten(self.folder, error)) from None

    def write_notes(self, step: int, skipped: Sequence[int]) -> None:
        """Write how many steps were done and which were skipped, from one process."""
        notes = {"step": step, "skipped": list(skipped)}
        write_text(self.folder / NOTES_FILE, json.dumps(notes))

    def notes(self) -> tuple[int, list[int]]:
        """Return the number of steps done and the steps skipped."""
        notes = read_json(self.folder / NOTES_FILE)
        if not isinstance(notes.get("step"), int) or not isinstance(notes.get("skipped"), list):
            raise InputError(f"{self.folder / NOTES_FILE}: is not a checkpoint's")
        return notes["step"], notes["skipped"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor, without reading them."""
        try:
            entries = dcp.FileSystemReader(self.folder).read_metadata().state_dict_metadata
        except Exception as error:  # damaged pickles raise anything
            raise InputError(f"{self.folder}: {_damaged(error)}") from None
        tensors = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        return {name: tuple(entry.size) for name, entry in tensors.items()}

    def read_whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors whole, in this process alone."""
        found = self.shapes()
        tensors = {name: torch.empty(found[name]) for name in names}
        self._fill(tensors, alone=True)
        return tensors

    def read_like(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors laid out as ``like``; every process of a job calls this."""
        if not any(isinstance(tensor, DTensor) for tensor in like.values()):
            return self.read_whole(like)
        tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
        self._fill(tensors)
        return tensors

    def _fill(self, tensors: dict[str, Any], alone: bool = False) -> None:
        # Where there is no job, torch says that there is none.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
        is_alone = alone or not dist.is_initialized()
        try:
            dcp.load(tensors, checkpoint_id=self.folder, no_dist=is_alone)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            raise InputError(f"{self.folder}: {_damaged(error)}") from None


class ShardsOnTheirWay:
    """Shards that are written while training goes on with the tensors they are made of."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
        """Copy the tensors to the host; ``group`` is a gloo group that nothing else talks in."""
        self.folder = folder
        self._done: Future[Any] = dcp.async_save(  # type: ignore[assignment]
            dict(tensors), checkpoint_id=folder, process_group=group
        )

    def is_done(self) -> bool:
        """Return whether this process has written its part."""
        return self._done.done()

    def wait(self) -> None:
        """Return when it has; raise InputError where it could not."""
        try:
            self._done.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise UnwrittenError(_unwritten(self.folder, error)) from None


def _barrier() -> None:
    """Wait for every process, and for no GPU."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def _unwritten(folder: Path, error: BaseException) -> str:
    why = f"{_reason(error)}; is the disk full?"
    return f"{folder}: cannot be written ({why}); the last checkpoint stands"


def _reason(error: BaseException) -> str:
    """Return one line: of what several processes met, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _damaged(error: BaseException) -> str:
    return f"not a complete checkpoint ({_reason(error)}); put back what is missing"
