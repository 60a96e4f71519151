"""Save checkpoints of a run, the best model, and the exported weights."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint import step_folders
from ..checkpoint.hf import MODEL_FILE, read_notes, require_match, save_model, write_directory_files
from ..checkpoint.step_folders import BEST
from ..checkpoint.training_state import (
    PARAMETER,
    OneFile,
    TrainingState,
    stored_in,
)
from ..common.errors import InputError
from ..distributed.parallel import Parallel
from ..model.config import ModelConfig
from ..model.llama import Llama
from .optimizer import MasterAdamW


def save_best(out: Path, model: Llama, optimizer: Optimizer, step: int, val_loss: float) -> None:
    """Export the model to best/, a Hugging Face model directory, with its step and loss."""
    exported = _export(model, optimizer)
    notes = {"step": str(step), "val_loss": repr(val_loss)}

    def write(folder: Path) -> None:
        write_directory_files(folder, model.config)
        save_model(folder, model.config, exported, notes)

    if (out / BEST).is_dir():  # the rest of it never changes
        save_model(out / BEST, model.config, exported, notes)
    else:
        step_folders.make_folder(out / BEST, write)


def best_loss(out: Path) -> float:
    """Return the lowest validation loss so far: that of the model in best/."""
    if not (out / BEST).is_dir():
        return math.inf
    try:
        return float(read_notes(out / BEST / MODEL_FILE).get("val_loss", "inf"))
    except InputError as error:
        raise InputError(f"--resume: {error}; or delete {out / BEST} to go on without it") from None


def _export(model: Llama, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters as a checkpoint holds them: in float32 where training keeps that."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(optimizer, MasterAdamW):
        return {name: optimizer.master(p).cpu() for name, p in parameters.items()}
    return parameters


class Saver(Protocol):
    """Saves a run's checkpoints, its best model and its exports; every process calls it."""

    keeps_best: bool  # in this process

    def validated(self, step: int, val_loss: float) -> None:
        """Keep the model if it is the best so far."""
        ...

    def save(self, step: int, skipped: Sequence[int], waits: bool) -> list[int]:
        """Save what training continues from; return the steps whose checkpoints are complete.

        Raises InputError, and leaves the last checkpoint, where a tensor is not finite.
        """
        ...

    def completed(self) -> list[int]:
        """Return the steps whose checkpoints have been completed since the last call."""
        ...

    def export(self) -> None:
        """Write the newest checkpoint's model beside it, where training has not done so already."""
        ...


def make_saver(
    out: Path,
    model: Llama,
    optimizer: Optimizer,
    parallel: Parallel,
    keep_last: int = 2,
    keep_best: bool = False,
) -> Saver:
    """Return what saves a run into ``out``: one process all of it, or each its shards."""
    if parallel.is_sharded:
        from .shard_saver import ShardSaver  # imports what a run of one process never needs

        return ShardSaver(out, model, optimizer, parallel, keep_last)
    return FileSaver(out, model, optimizer, parallel, keep_last, keep_best)


class FileSaver:
    """Saves from the first process, which holds all that every process holds."""

    def __init__(
        self,
        out: Path,
        model: Llama,
        optimizer: Optimizer,
        parallel: Parallel,
        keep_last: int,
        keep_best: bool,
    ) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.parallel, self.keep_last = parallel, keep_last
        self.keeps_best = keep_best and parallel.is_main_process
        self.best = best_loss(out) if self.keeps_best else 0.0

    def validated(self, step: int, val_loss: float) -> None:
        """Keep the model if it is the best so far."""
        if self.keeps_best and val_loss < self.best:
            save_best(self.out, self.model, self.optimizer, step, val_loss)
            self.best = val_loss

    def save(self, step: int, skipped: Sequence[int], waits: bool) -> list[int]:
        """Save the state as one file, then export the model from it."""
        if self.parallel.is_main_process:
            self._save(step, skipped)
        self.parallel.barrier()
        return [step]

    def completed(self) -> list[int]:
        """Return no steps: each checkpoint is complete when it is saved."""
        return []

    def export(self) -> None:
        """Do nothing: each checkpoint was exported when it was saved."""

    def _save(self, step: int, skipped: Sequence[int]) -> None:
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if not parameter.isfinite().all():
                raise InputError(
                    f"{name} is not finite after step {step}; lower --lr (the last checkpoint "
                    "stands)"
                )
        state = TrainingState(training_state(self.model, self.optimizer), step, skipped)
        write = partial(_write_one_file, state)
        step_folders.commit(self.out, step, write, self.keep_last)
        exported = {name: state.tensors[PARAMETER + name] for name in parameters}
        save_model(self.out, self.model.config, exported)


def _write_one_file(state: TrainingState, folder: Path) -> None:
    OneFile(folder).write(state)


def training_state(model: Llama, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return parameters and moments by the names that a checkpoint gives them."""
    exported, tensors = _export(model, optimizer), {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[PARAMETER + name] = exported[name].detach()
        for kind in ("exp_avg", "exp_avg_sq"):  # which the first update makes
            moment = state[kind] if state else torch.zeros_like(parameter, requires_grad=False)
            tensors[f"{kind}.{name}"] = moment
    return tensors


def export_model(out: Path, folder: Path, config: ModelConfig) -> None:
    """Write the Hugging Face directory ``out`` from a checkpoint, as one process."""
    stored = stored_in(folder)
    tensors = stored.read_whole(name for name in stored.shapes() if name.startswith(PARAMETER))
    parameters = {name.removeprefix(PARAMETER): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in Llama(config).named_parameters()}
    require_match(folder, expected, {n: tuple(t.shape) for n, t in parameters.items()})
    write_directory_files(out, config)
    save_model(out, config, parameters)
