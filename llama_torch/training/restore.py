"""Restore a model and its optimizer from a run's newest checkpoint."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import step_folders
from ..checkpoint import training_state as sharded
from ..checkpoint.hf import MODEL_FILE, require_match, save_model, write_directory_files
from ..checkpoint.training_state import STATE_FILE, load_state
from ..common.errors import InputError
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .optimizer import MasterAdamW
from .saver import training_state


def restore(
    out: Path,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel | None = None,
) -> tuple[int, list[int]]:
    """Load the newest checkpoint; return the number of steps done, and which were skipped.

    A run that was stopped before its first checkpoint starts from step 0. The export is
    written again, in case the run was killed between the checkpoint and it. Whether one process
    or many wrote the checkpoint, any number can read it.
    """
    parallel = parallel or Parallel()
    if parallel.is_first:
        step_folders.sweep(out)
    parallel.barrier()
    folder = step_folders.newest(out)
    if folder is None:
        if (out / MODEL_FILE).exists():
            raise InputError(
                f"--resume: {out} has a model but no checkpoint in {step_folders.FOLDER}/ to "
                "continue from; put it back, or start a new run with another --out"
            )
        if parallel.is_first:
            write_directory_files(out, model.config)
        return 0, []
    try:
        tensors, step, skipped = _read(folder, model, optimizer, parallel)
        if folder.name != str(step):
            raise InputError(f"{folder}: is of step {step}; rename it")
    except InputError as error:
        older = step_folders.newest(out, before=int(folder.name))
        remedy = "start a new run with another --out"
        if older:
            remedy = f"delete {folder} to continue from step {older.name}"
        raise InputError(f"--resume: {error}; or {remedy}") from None
    if parallel.is_sharded and not sharded.holds(folder):
        tensors = _take_shards(folder, tensors, model, optimizer, parallel)
    _assign(tensors, model, optimizer, step - len(skipped))
    if parallel.is_first and not parallel.is_sharded:
        names = (name for name, _ in model.named_parameters())
        save_model(out, model.config, {n: tensors[f"parameter.{n}"] for n in names})
    return step, skipped


def _read(
    folder: Path, model: Llama, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[dict[str, Tensor], int, list[int]]:
    """Return a checkpoint's tensors, the number of its steps, and those skipped.

    Tensors of one file are whole; others are laid out as the model's are.
    """
    parameters = dict(model.named_parameters())
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    expected = {f"{kind}.{n}": tuple(p.shape) for n, p in parameters.items() for kind in kinds}
    if sharded.holds(folder):
        step, skipped = sharded.read_notes(folder)
        if not parallel.is_sharded:
            require_match(folder, expected, sharded.shapes(folder))
            return sharded.load_whole(folder, expected), step, skipped
        tensors = _like_state(model, optimizer)
        sharded.load(folder, tensors)
        return tensors, step, skipped
    whole, step, skipped = load_state(folder)
    require_match(folder / STATE_FILE, expected, {n: tuple(t.shape) for n, t in whole.items()})
    return whole, step, skipped


def _like_state(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = training_state(model, optimizer)
    return {name: torch.empty_like(tensor) for name, tensor in state.items()}


def _take_shards(
    folder: Path,
    whole: dict[str, Tensor],
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel,
) -> dict[str, Tensor]:
    """Return every process's shards, out of a copy in the other form, which does not remain."""
    tensors = _like_state(model, optimizer)
    copy = folder.with_name(f"{folder.name}.shards{step_folders.TEMPORARY}")
    if parallel.is_first:
        try:
            sharded.save(copy, whole, alone=True)
        except InputError as error:
            raise InputError(f"--resume: {error}; make room there") from None
    parallel.barrier()
    sharded.load(copy, tensors)
    parallel.barrier()
    if parallel.is_first:
        shutil.rmtree(copy, ignore_errors=True)
    return tensors


@torch.no_grad()
def _assign(
    tensors: dict[str, Tensor], model: Llama, optimizer: torch.optim.Optimizer, updates: int
) -> None:
    for name, parameter in model.named_parameters():
        device, master = parameter.device, tensors[f"parameter.{name}"]
        state = optimizer.state[parameter]
        if isinstance(optimizer, MasterAdamW):
            optimizer.set_master(parameter, master.to(device))
            state["step"] = torch.tensor(float(updates))
        else:
            parameter.copy_(master)
            state["step"] = torch.tensor(float(updates), device=device)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = tensors[f"{kind}.{name}"].to(device)
