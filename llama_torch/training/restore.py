"""Restore a model and its optimizer from a run's newest checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import step_folders
from ..checkpoint.hf import MODEL_FILE, require_match, save_model, write_directory_files
from ..checkpoint.training_state import PARAMETER, UnwrittenError, stored_in
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
    if parallel.is_main_process:
        step_folders.sweep(out)
    parallel.barrier()
    folder = step_folders.newest(out)
    if folder is None:
        if (out / MODEL_FILE).exists():
            raise InputError(
                f"--resume: {out} has a model but no checkpoint in {step_folders.FOLDER}/ to "
                "continue from; put it back, or start a new run with another --out"
            )
        if parallel.is_main_process:
            write_directory_files(out, model.config)
        return 0, []
    try:
        stored = stored_in(folder)
        step, skipped = stored.notes()
        if folder.name != str(step):
            raise InputError(f"{folder}: is of step {step}; rename it")
        layout = training_state(model, optimizer)
        require_match(stored.path, {n: tuple(t.shape) for n, t in layout.items()}, stored.shapes())
        tensors = stored.read_like(layout)
    except UnwrittenError as error:  # the shards of what one process wrote
        raise InputError(f"--resume: {error}; make room there") from None
    except InputError as error:
        older = step_folders.newest(out, before=int(folder.name))
        remedy = "start a new run with another --out"
        if older:
            remedy = f"delete {folder} to continue from step {older.name}"
        raise InputError(f"--resume: {error}; or {remedy}") from None
    _assign(tensors, model, optimizer, step - len(skipped))
    if parallel.is_main_process and not parallel.is_sharded:  # who holds the model whole
        names = (name for name, _ in model.named_parameters())
        save_model(out, model.config, {n: tensors[PARAMETER + n] for n in names})
    return step, skipped


@torch.no_grad()
def _assign(
    tensors: dict[str, Tensor], model: Llama, optimizer: torch.optim.Optimizer, updates: int
) -> None:
    for name, parameter in model.named_parameters():
        device, master = parameter.device, tensors[PARAMETER + name]
        state = optimizer.state[parameter]
        if isinstance(optimizer, MasterAdamW):
            optimizer.set_master(parameter, master.to(device))
            state["step"] = torch.tensor(float(updates))
        else:
            parameter.copy_(master)
            state["step"] = torch.tensor(float(updates), device=device)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = tensors[f"{kind}.{name}"].to(device)
