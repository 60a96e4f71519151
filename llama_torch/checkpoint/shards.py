"""Training state as shards that torch.distributed.checkpoint writes and reads."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..common.errors import InputError
from ..common.files import read_json, write_text
from ..common.sharded_tensor import is_sharded
from .training_state import UnwrittenError

NOTES_FILE = "state.json"


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
        if not any(is_sharded(tensor) for tensor in like.values()):
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
