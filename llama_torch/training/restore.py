"""Restore a model and its optimizer from a run's newest checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..checkpoint import step_folders
from ..checkpoint.directory_files import write_directory_files
from ..checkpoint.file_names import MODEL_FILE
from ..checkpoint.hf import require_match, save_model
from ..checkpoint.state_interface import PARAMETER, UnwrittenError
from ..checkpoint.training_state import open_checkpoint
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .optimizer import MasterAdamW
from .state_tensors import MOMENTS, exported, state_shapes, state_tensors, unsound


def restore(
    out: Path,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel | None = None,
    source: Path | None = None,
) -> tuple[int, list[int]]:
    """Load the newest checkpoint into model and optimizer; return steps done and steps skipped.

    A run without a checkpoint starts from step 0, with the files that stand beside the weights in
    ``source``, the model directory that it begins from. Any number of processes can read a
    checkpoint, whether it is one file or shards. The exported model is written again, as a kill may
    have come between the checkpoint and its export. Raises InputError for a checkpoint that is
    damaged or does not fit the model; the message names an older one to continue from.
    """
    parallel = parallel or Parallel()
    if parallel.is_main_process:
        step_folders.remove_temporary(out)
    parallel.barrier()
    folder = step_folders.newest(out)
    if folder is None:
        if (out / MODEL_FILE).exists():
            raise InputError(
                f"--resume: {out} has a model but no checkpoint in {step_folders.FOLDER}/ to "
                "continue from; put it back, or start a new run with another --out"
            )
        if parallel.is_main_process:
            write_directory_files(out, model.config, source)
        return 0, []
    try:
        tensors, step, skipped = _read(folder, model, optimizer, parallel)
    except UnwrittenError as error:  # the temporary re-sharded copy could not be written
        raise InputError(f"--resume: {error}; make room there") from None
    except InputError as error:
        older = step_folders.newest(out, before=int(folder.name))
        remedy = "start a new run with another --out"
        if older:
            remedy = f"delete {folder} to continue from step {older.name}"
        raise InputError(f"--resume: {error}; or {remedy}") from None
    _assign(tensors, model, optimizer, step - len(skipped))
    if parallel.is_main_process and not parallel.is_sharded:  # the model is whole
        names = (name for name, _ in model.named_parameters())
        save_model(out, model.config, exported({n: tensors[PARAMETER + n] for n in names}))
    return step, skipped


def _read(
    folder: Path, model: Llama, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[dict[str, Tensor], int, list[int]]:
    """Return a checkpoint's tensors, sharded as the model is, its step and the steps skipped."""
    reader, step, skipped = open_checkpoint(folder)
    shapes = state_shapes(model)
    require_match(reader.path, shapes, reader.shapes())
    if parallel.is_sharded:
        tensors = reader.read_like(state_tensors(model, optimizer))
    else:
        tensors = reader.read_whole(shapes)
    problem = unsound(tensors)
    if parallel.all_reduce_max(int(problem != "")):
        raise InputError(f"{reader.path}: {problem or 'a tensor'} is damaged; copy it back")
    return tensors, step, skipped


@torch.no_grad()
def _assign(
    tensors: dict[str, Tensor], model: Llama, optimizer: torch.optim.Optimizer, adam_step: int
) -> None:
    """Copy parameters and moments into model and optimizer, and set Adam's update count."""
    for name, parameter in model.named_parameters():
        device, master = parameter.device, tensors[PARAMETER + name]
        state = optimizer.state[parameter]
        if isinstance(optimizer, MasterAdamW):
            optimizer.set_master(parameter, master.to(device))
            state["step"] = torch.tensor(float(adam_step))
        else:
            parameter.copy_(master)
            state["step"] = torch.tensor(float(adam_step), device=device)
        for kind in MOMENTS:
            moment = tensors[f"{kind}.{name}"].to(device)
            kept_as = optimizer.moments if isinstance(optimizer, MasterAdamW) else moment.dtype
            state[kind] = moment.to(kept_as)
