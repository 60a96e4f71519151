"""Save checkpoints of a sharded run: every process writes its own shards."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import Optimizer

from llama_common.errors import InputError

from ..checkpoint import step_folders
from ..checkpoint.shards import AsyncShardWrite, StateShards
from ..common.sharded_tensor import local_part
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .state_tensors import export_model, state_tensors


class ShardSaver:
    """Saves sharded checkpoints from every process; implements Saver.

    GPU shards are copied to the host and written asynchronously, while training goes on.
    """

    keeps_best = False  # no process holds the whole model

    def __init__(
        self, out: Path, model: Llama, optimizer: Optimizer, parallel: Parallel, keep_last: int
    ) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.parallel, self.keep_last = parallel, keep_last
        self.pending: tuple[int, AsyncShardWrite] | None = None

    def validated(self, step: int, val_loss: float) -> None:
        """Do nothing: a sharded run keeps no best model."""

    def save(self, step: int, skipped: Sequence[int], wait: bool) -> list[int]:
        """Save the training state as shards; on a GPU asynchronously unless ``wait``.

        Returns the steps of the checkpoints completed. Raises InputError, and keeps the last
        checkpoint, where a tensor is not finite or the disk refuses the files.
        """
        completed, final = self._wait_pending(), step_folders.final_folder(self.out, step)
        tensors = state_tensors(self.model, self.optimizer)
        self._require_finite(tensors, step)
        shards = StateShards(step_folders.temporary_path(final))
        with step_folders.disk_errors(final):
            if self.parallel.is_main_process:
                step_folders.create_temporary(final)
                shards.write_metadata(step, skipped)
        self.parallel.barrier()
        if next(iter(tensors.values())).is_cuda:
            group = self.parallel.control_group()
            self.pending = step, AsyncShardWrite(shards.folder, tensors, group)
            return completed + (self._wait_pending() if wait else [])
        with self._removed_on_error(shards.folder):
            shards.write(tensors)
        return [*completed, self._publish(step)]

    def export(self) -> None:
        """Write the newest checkpoint's model to the run directory, from the main process."""
        if self.parallel.is_main_process:
            folder = step_folders.newest(self.out)
            assert folder is not None
            export_model(self.out, folder, self.model.config, self.out)
        self.parallel.barrier()

    def completed(self) -> list[int]:
        """Return the steps whose checkpoints have been completed since the last call."""
        if self.pending and not self.parallel.all_reduce_max(int(not self.pending[1].is_done())):
            return self._wait_pending()
        return []

    def _require_finite(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        is_finite = torch.stack([local_part(t).isfinite().all() for t in tensors.values()]).all()
        is_bad = self.parallel.all_reduce_max(int(not is_finite))
        with self.parallel.errors_on_main_only():
            if is_bad:
                raise InputError(
                    f"a parameter or moment is not finite after step {step}; lower --lr (the last "
                    "checkpoint stands)"
                )

    def _wait_pending(self) -> list[int]:
        """Wait for the asynchronous write, publish its checkpoint, and return its step, if any."""
        if self.pending is None:
            return []
        step, write = self.pending
        with self._removed_on_error(write.folder):
            write.wait()
        self.pending = None
        return [self._publish(step)]

    @contextmanager
    def _removed_on_error(self, folder: Path) -> Iterator[None]:
        """Remove the temporary folder if writing it fails."""
        try:
            yield
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _publish(self, step: int) -> int:
        """Rename the temporary folder to the checkpoint's name once every process has written."""
        self.parallel.barrier()
        if self.parallel.is_main_process:
            final = step_folders.final_folder(self.out, step)
            with step_folders.disk_errors(final):
                step_folders.publish(final)
            step_folders.prune(self.out, self.keep_last)
        self.parallel.barrier()
        return step
