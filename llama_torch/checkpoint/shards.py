"""Training state as shards of torch.distributed.checkpoint; each process has its own."""

import io
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from llama_common.errors import InputError

from ..common.sharded_tensor import is_sharded
from ..common.state_file import read_state, write_state
from .shard_index import read_index, require_backed
from .state_interface import COPY_AGAIN, UnwrittenError, check_steps, require_float32

STEPS_FILE = "state.json"

CHUNK = 1 << 22  # bytes read at a time to verify them


class _Reader(dcp.FileSystemReader):
    """torch's reader of shards, but for the index, which it would unpickle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_index(folder)
        require_backed(folder, self.index)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the index that was read before; one process's own index is never asked for."""
        return self.index

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        """Return a tensor's part of a shard, once its checksums are verified.

        A part is what torch.save writes, a zip archive of uncompressed files; torch.load does not
        look at their checksums.
        """
        file.seek(sinfo.offset)
        part = io.BytesIO(file.read(sinfo.length))
        try:
            with zipfile.ZipFile(part) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("compressed, as no checkpoint is")
                    with archive.open(entry) as content:
                        while content.read(CHUNK):
                            pass
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise ValueError(f"{sinfo.relative_path} is damaged: {error}") from None
        part.seek(0)
        return part


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner of a load, but for entries that are no tensors, which it would unpickle."""

    def load_bytes(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse an entry that is no tensor; an index of tensors asks for none."""
        raise ValueError("an entry is no tensor")


class StateShards:
    """A training state as a folder of shards, with the steps in a JSON file (a StateReader)."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.path = folder

    def write(self, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
        """Write the tensors; collective: every process of the job calls it with its own shards.

        ``alone``: write whole tensors from this process, without collective calls. Raises
        UnwrittenError where the disk refuses them.
        """
        is_alone = alone or not dist.is_initialized()
        try:
            dcp.save(dict(tensors), checkpoint_id=self.folder, no_dist=is_alone)
        except (CheckpointException, OSError) as error:
            raise UnwrittenError(_unwritten(self.folder, error)) from None

    def write_metadata(self, step: int, skipped: Sequence[int]) -> None:
        """Write the number of steps done and the steps skipped, from one process."""
        write_state(self.folder / STEPS_FILE, {"step": step, "skipped": list(skipped)})

    def metadata(self) -> tuple[int, list[int]]:
        """Return the number of steps done, and the steps whose update was skipped."""
        path = self.folder / STEPS_FILE
        metadata, _ = read_state(path, COPY_AGAIN)
        try:
            return check_steps(metadata.get("step"), metadata.get("skipped"))
        except ValueError as error:
            raise InputError(f"{path}: is not a checkpoint's ({error}); {COPY_AGAIN}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name, from the metadata alone."""
        return self._shapes(read_index(self.folder))

    def _shapes(self, index: Metadata) -> dict[str, tuple[int, ...]]:
        entries: dict[str, Any] = index.state_dict_metadata
        for name, entry in entries.items():
            require_float32(self.folder, name, entry.properties.dtype, torch.float32)
        return {name: tuple(entry.size) for name, entry in entries.items()}

    def read_whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors unsharded, on the CPU; without collective calls."""
        reader = _Reader(self.folder)
        shapes = self._shapes(reader.index)
        tensors = {name: torch.empty(shapes[name]) for name in names}
        self._read_into(tensors, reader, alone=True)
        return tensors

    def read_like(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with the names and the placements (sharding) of ``like``.

        Collective where ``like`` is sharded: every process of the job calls it.
        """
        if not any(is_sharded(tensor) for tensor in like.values()):
            return self.read_whole(like)
        tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
        self._read_into(tensors, _Reader(self.folder))
        return tensors

    def _read_into(self, tensors: dict[str, Any], reader: _Reader, alone: bool = False) -> None:
        """Read into tensors in place, without collective calls if ``alone``."""
        # torch warns of every load outside a distributed job, which is the usual case here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch")
        is_alone = alone or not dist.is_initialized()
        try:
            dcp.load(tensors, storage_reader=reader, planner=_Planner(), no_dist=is_alone)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            raise InputError(f"{self.folder}: {_damaged(error)}") from None


class AsyncShardWrite:
    """An asynchronous write of this process's shards; training may change the tensors meanwhile."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
        """Copy the tensors to the host and start writing them.

        ``group`` is a gloo process group that no other collective call uses.
        """
        self.folder = folder
        self._done: Future[Any] = dcp.async_save(  # type: ignore[assignment]
            dict(tensors), checkpoint_id=folder, process_group=group
        )

    def is_done(self) -> bool:
        """Return whether this process has written its shards."""
        return self._done.done()

    def wait(self) -> None:
        """Block until this process has written its shards; raise UnwrittenError on failure."""
        try:
            self._done.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise UnwrittenError(_unwritten(self.folder, error)) from None


def _unwritten(folder: Path, error: BaseException) -> str:
    why = f"{_reason(error)}; is the disk full?"
    return f"{folder}: cannot be written ({why}); the last checkpoint stands"


def _reason(error: BaseException) -> str:
    """Return an error's first line; of a failed collective write, the first process's error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _damaged(error: BaseException) -> str:
    return f"not a complete checkpoint ({_reason(error)}); put back what is missing"
