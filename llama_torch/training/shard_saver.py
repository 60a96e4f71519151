"""Save checkpoints of a run of several processes, each its shards."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import Optimizer

from ..checkpoint import step_folders
from ..checkpoint.shards import Shards, ShardsOnTheirWay
from ..common.errors import InputError
from ..common.sharded_tensor import local_part
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .saver import export_model, training_state


class ShardSaver:
    """Saves from every process, each its shards.

    Shards on a GPU are copied to the host, and written while training goes on.
    """

    keeps_best = False  # no process holds the whole model

    def __init__(
        self, out: Path, model: Llama, optimizer: Optimizer, parallel: Parallel, keep_last: int
    ) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.parallel, self.keep_last = parallel, keep_last
        self.pending: tuple[int, ShardsOnTheirWay] | None = None

    def validated(self, step: int, val_loss: float) -> None:
        """Keep no best model."""

    def save(self, step: int, skipped: Sequence[int], waits: bool) -> list[int]:
        """Save the state as shards; of a GPU's, only ``waits`` returns when they are written."""
        saved, final = self._finish(), step_folders.final_folder(self.out, step)
        tensors = training_state(self.model, self.optimizer)
        good = torch.stack([local_part(t).isfinite().all() for t in tensors.values()]).all()
        bad = self.parallel.all_reduce_max(int(not good))
        with self.parallel.errors_on_main_only():
            if bad:
                raise InputError(
                    f"a parameter or moment is not finite after step {step}; lower --lr (the last "
                    "checkpoint stands)"
                )
        shards = Shards(step_folders.temporary(final))
        with step_folders.writing(final):
            if self.parallel.is_main_process:
                step_folders.begin(final)
                shards.write_notes(step, skipped)
        self.parallel.barrier()
        if next(iter(tensors.values())).is_cuda:
            self.pending = (
                step,
                ShardsOnTheirWay(shards.folder, tensors, self.parallel.control_group()),
            )
            return saved + (self._finish() if waits else [])
        with self._clearing(shards.folder):
            shards.write(tensors)
        return [*saved, self._commit(step)]

    def export(self) -> None:
        """Write the newest checkpoint's model beside it: training has not done so."""
        if self.parallel.is_main_process:
            folder = step_folders.newest(self.out)
            assert folder is not None
            export_model(self.out, folder, self.model.config)
        self.parallel.barrier()

    def completed(self) -> list[int]:
        """Return the steps whose checkpoints have been completed since the last call."""
        if self.pending and not self.parallel.all_reduce_max(int(not self.pending[1].is_done())):
            return self._finish()
        return []

    def _finish(self) -> list[int]:
        if self.pending is None:
            return []
        step, saving = self.pending
        with self._clearing(saving.folder):
            saving.wait()
        self.pending = None
        return [self._commit(step)]

    @contextmanager
    def _clearing(self, folder: Path) -> Iterator[None]:
        """Leave nothing of what could not be written."""
        try:
            yield
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _commit(self, step: int) -> int:
        self.parallel.barrier()
        if self.parallel.is_main_process:
            final = step_folders.final_folder(self.out, step)
            with step_folders.writing(final):
                step_folders.finish(final)
            step_folders.prune(self.out, self.keep_last)
        self.parallel.barrier()
        return step
