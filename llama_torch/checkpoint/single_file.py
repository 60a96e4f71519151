"""Training state as one safetensors file, which one process writes."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llama_common.errors import InputError, is_digits
from llama_common.files import remove

from ..common.sharded_tensor import is_sharded
from ..common.state_file import abridged, verified, with_checksum
from .file_names import STATE_FILE
from .hf import save_tensors
from .state_interface import COPY_AGAIN, TrainingState, UnwrittenError, check_steps, require_float32
from .step_folders import TEMPORARY
from .weight_files import open_safetensors

SUMS = "sums"  # of the tensors' bits, in the metadata


def bit_sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bytes; of a float32 one's, of its 32-bit words as integers.

    A changed bit changes it. It takes one pass over the memory, where SHA-256 takes ten times as
    long.
    """
    words = torch.int32 if tensor.dtype == torch.float32 else torch.uint8
    return int(tensor.detach().contiguous().view(-1).view(words).sum(dtype=torch.int64))


class SingleFile:
    """A training state in one safetensors file, whose metadata holds the steps (a StateReader)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / STATE_FILE

    def write(self, state: TrainingState) -> None:
        """Write a training state, from one process; raise InputError where the disk refuses it."""
        metadata = {"step": str(state.step), "skipped": json.dumps(list(state.skipped))}
        metadata[SUMS] = json.dumps({name: bit_sum(t) for name, t in state.tensors.items()})
        save_tensors(self.path, state.tensors, with_checksum(metadata))

    def metadata(self) -> tuple[int, list[int]]:
        """Return the number of steps done, and the steps whose update was skipped."""
        metadata = self._metadata()
        step = metadata.get("step", "")
        if not is_digits(step) or len(step) > 19:
            raise InputError(
                f"{self.path}: names no step, so it is not a training state of this package"
            )
        try:
            return check_steps(int(step), json.loads(metadata.get("skipped", "[]")))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: damaged metadata ({error}); {COPY_AGAIN}") from None

    def _metadata(self) -> dict[str, str]:
        with open_safetensors(self.path) as file:
            found = file.metadata() or {}
        return verified(found, str(self.path), COPY_AGAIN)[0]

    def _sums(self) -> dict[str, int]:
        """Return the tensors' sums; empty for a file of an earlier version, which has none."""
        text = self._metadata().get(SUMS, "{}")
        try:
            sums = json.loads(text)
            if not isinstance(sums, dict):
                raise ValueError(f"{SUMS} is {abridged(sums)}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: damaged metadata ({error}); {COPY_AGAIN}") from None
        return sums

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name, from the header alone."""
        shapes = {}
        with open_safetensors(self.path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                require_float32(self.path, name, part.get_dtype(), "F32")
                shapes[name] = tuple(part.get_shape())
        return shapes

    def read_whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors unsharded, on the CPU; without collective calls."""
        sums, tensors = self._sums(), dict[str, Tensor]()
        with open_safetensors(self.path) as file:
            for name in names:
                tensors[name] = file.get_tensor(name)
                if sums.get(name, (found := bit_sum(tensors[name]))) != found:
                    raise InputError(f"{self.path}: {name} is not as it was written; {COPY_AGAIN}")
        return tensors

    def read_like(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with the names and the placements (sharding) of ``like``.

        Shards are read from a temporary copy in the other encoding, which the main process
        writes. Collective where ``like`` is sharded. Raises UnwrittenError where there is no room
        for the copy.
        """
        if not any(map(is_sharded, like.values())):
            return self.read_whole(like)
        from .shards import StateShards  # imports torch.distributed.checkpoint, for 0.2 s

        copy = StateShards(self.folder.with_name(f"{self.folder.name}.shards{TEMPORARY}"))
        is_main_process = not dist.is_initialized() or dist.get_rank() == 0
        if is_main_process:
            _create(copy.folder)
            copy.write(self.read_whole(like), alone=True)
        _barrier()
        tensors = copy.read_like(like)
        _barrier()
        if is_main_process:
            shutil.rmtree(copy.folder, ignore_errors=True)
        return tensors


def _create(folder: Path) -> None:
    """Create an empty folder in place of a killed process's; raise UnwrittenError."""
    try:
        remove(folder)
        folder.mkdir()
    except OSError as error:
        raise UnwrittenError(f"{folder}: cannot be written ({error})") from None


def _barrier() -> None:
    """Wait for every process, through the CPU's backend: GPU work is not waited for."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
