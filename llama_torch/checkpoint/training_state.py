"""Training state: one file, or shards that torch.distributed.checkpoint writes and reads."""

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
from .hf import _open, _save_tensors, require_match

STATE_FILE = "training_state.safetensors"

NOTES_FILE = "state.json"

METADATA_FILE = ".metadata"  # written last: a folder without it is no checkpoint


def save_state(
    directory: Path, tensors: Mapping[str, Tensor], step: int, skipped: Sequence[int] = ()
) -> None:
    """Write all that training continues from, parameters included, as one file.

    model.safetensors is an export of it, never a part of it.
    """
    notes = {"step": str(step), "skipped": json.dumps(list(skipped))}
    _save_tensors(directory / STATE_FILE, tensors, notes)


def load_state(directory: Path) -> tuple[dict[str, Tensor], int, list[int]]:
    """Read what ``save_state`` wrote: tensors, the number of steps done, those not taken."""
    path = directory / STATE_FILE
    with _open(path) as file:
        notes = file.metadata() or {}
        if not notes.get("step", "").isdigit():
            raise InputError(
                f"{path}: names no step, so it is not a training state of this package"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, int(notes["step"]), json.loads(notes.get("skipped", "[]"))


def holds(folder: Path) -> bool:
    """Return whether a folder holds a state in this form."""
    return (folder / METADATA_FILE).is_file()


def save(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Write a state; every process of the job calls this, each with its own shards.

    ``alone``: one process has them whole, and the others know nothing of it.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=alone or not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        raise InputError(_unwritten(folder, error)) from None


class Saving:
    """A state on its way to the disk, while training goes on with the tensors it was made of."""

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
            raise InputError(_unwritten(self.folder, error)) from None


def _unwritten(folder: Path, error: BaseException) -> str:
    why = f"{_reason(error)}; is the disk full?"
    return f"{folder}: cannot be written ({why}); the last checkpoint stands"


def _reason(error: BaseException) -> str:
    """Return one line: of what several processes met, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or sharded, with what the folder holds under their names."""
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_match(folder, expected, shapes(folder))
    _load(folder, dict(tensors))


def load_whole(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return tensors as one process, in any job or none, can hold them."""
    found = shapes(folder)
    tensors = {name: torch.empty(found[name]) for name in names}
    _load(folder, tensors, no_dist=True)
    return tensors


def write_notes(folder: Path, step: int, skipped: Sequence[int]) -> None:
    """Write beside the tensors how many steps were done and which of them skipped."""
    write_text(folder / NOTES_FILE, json.dumps({"step": step, "skipped": list(skipped)}))


def read_notes(folder: Path) -> tuple[int, list[int]]:
    """Read what ``write_notes`` wrote."""
    notes = read_json(folder / NOTES_FILE)
    if not isinstance(notes.get("step"), int) or not isinstance(notes.get("skipped"), list):
        raise InputError(f"{folder / NOTES_FILE}: is not a checkpoint's")
    return notes["step"], notes["skipped"]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of everything in a state, without reading it."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # damaged pickles raise anything
        raise InputError(f"{folder}: {_damaged(error)}") from None
    entries = metadata.state_dict_metadata
    return {n: tuple(e.size) for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _load(folder: Path, tensors: dict[str, Any], no_dist: bool = False) -> None:
    # Where there is no job, torch says that there is none.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
    try:
        dcp.load(tensors, checkpoint_id=folder, no_dist=no_dist or not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{folder}: {_damaged(error)}") from None


def _damaged(error: BaseException) -> str:
    return f"not a complete checkpoint ({_reason(error)}); put back what is missing"
