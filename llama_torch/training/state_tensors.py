"""Convert a model and its optimizer to the tensors of a checkpoint, and a checkpoint to a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from llama_common.errors import InputError

from ..checkpoint.directory_files import write_directory_files
from ..checkpoint.hf import require_match, save_model
from ..checkpoint.state_interface import PARAMETER
from ..checkpoint.training_state import open_checkpoint
from ..common.sharded_tensor import local_part
from ..model.config import ModelConfig
from ..model.llama import Llama
from ..model.shapes import SCORE, VALUE, ParameterShapes
from .optimizer import MasterAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by their names in torch's optimizers


def stored_parameters(model: Llama, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters as a checkpoint stores them: float32 masters if training has them."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(optimizer, MasterAdamW):
        return {name: optimizer.master(p).cpu() for name, p in parameters.items()}
    return parameters


def exported(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that a model directory has: all but a policy's value head."""
    return {name: tensor for name, tensor in parameters.items() if name != VALUE}


def state_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of ``state_tensors``, without making a tensor."""
    return {
        prefix + name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        for prefix in (PARAMETER, *(f"{kind}." for kind in MOMENTS))
    }


def state_tensors(model: Llama, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return parameters and Adam's moments by their names in a checkpoint, sharded as the model is.

    Each tensor has its parameter's shape, and is float32: a moment that is kept in bfloat16 is
    one too. Adam creates its moments at its first update; before it they are zeros.
    """
    stored, tensors = stored_parameters(model, optimizer), {}
    for name, parameter in model.named_parameters():
        adam_state = optimizer.state[parameter]
        tensors[PARAMETER + name] = stored[name].detach()
        for kind in MOMENTS:
            moment = (
                adam_state[kind] if adam_state else torch.zeros_like(parameter, requires_grad=False)
            )
            if moment.dtype == torch.bfloat16:  # widened on the host, where there is room
                moment = moment.cpu().float()
            tensors[f"{kind}.{name}"] = moment
    return tensors


def unsound(tensors: Mapping[str, Tensor]) -> str:
    """Return a tensor of a checkpoint that no run saves, and why; empty = all may be saved ones.

    Of sharded tensors this process's part is looked at.
    """
    for name, tensor in tensors.items():
        part = local_part(tensor)
        if not part.isfinite().all():
            return f"{name}, which is not finite,"
        if name.startswith(f"{MOMENTS[1]}.") and (part < 0).any():
            return f"{name}, a mean of squares that is negative,"
    return ""


def export_model(out: Path, folder: Path, config: ModelConfig, run: Path) -> None:
    """Write a Hugging Face model directory ``out`` from the checkpoint in ``folder`` of ``run``.

    One process does it, without collective calls. Raises InputError for a checkpoint that is
    damaged or does not fit ``config``.
    """
    reader, *_ = open_checkpoint(folder)
    shapes = {n: shape for n, shape in reader.shapes().items() if n.startswith(PARAMETER)}
    shapes.pop(PARAMETER + VALUE, None)
    found = {n.removeprefix(PARAMETER): shape for n, shape in shapes.items()}
    require_match(folder, ParameterShapes(config, SCORE in found), found)
    tensors = reader.read_whole(shapes)
    if problem := unsound(tensors):
        raise InputError(f"{reader.path}: {problem} is damaged; copy it back, or take another step")
    parameters = {name.removeprefix(PARAMETER): tensor for name, tensor in tensors.items()}
    write_directory_files(out, config, run)
    save_model(out, config, parameters)
