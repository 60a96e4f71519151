"""``--verify-every``: compare a model in training with the NumPy oracle.

This module, error_bounds.py, float8_check.py and oracle.py import the oracle, and nothing else of
the package does; the trainer imports them for this flag alone.

What is verified is what trains. The live model, compiled or not, takes whole micro-batches of the
step just done, in which all but a few targets are ignored. Attention is causal, so that what is
left (the loss, its gradients, the logits of the positions that count) depends on a few short rows
alone, and those are all that the oracle computes. A dependence on other rows or later tokens is
an error here.

Errors of long sums do not show in a few rows. The embedding's gradient sums as many terms as a
token occurs, up to half of a micro-batch: with all targets, it is compared with the float64 sum of
its own terms.

Rounded to fp8, a term may fall to either side, so that errors of a whole model have no useful
bound: a model that trains in fp8 is compared in its own precision, and its fp8 products by
themselves (float8_check.py).

``observe`` runs a model; ``bound_errors`` compares what a model computed, however it is spread over
devices, given whole tensors on the CPU.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_common.errors import InputError
from llama_common.memory import gib, host_memory
from reference_np.naming import EMBED
from reference_np.tolerances import LAMBDA

from ..checkpoint.file_names import MODEL_FILE
from ..model.config import ModelConfig
from ..model.float8_linear import uses_float8, without_float8
from ..model.llama import Llama
from ..model.loss import IGNORE_INDEX, count_valid
from ..model.shapes import parameter_count
from . import step
from .batch import Batch
from .error_bounds import BoundedError, Observed, bound_errors, worst_of_each
from .float8_check import float8_errors
from .objective import TokenLoss
from .oracle import PARTS
from .verify_sums import embedding_error, gradients_aside

# Of host memory for each parameter: gradients in float64 and twice in float32, and one matrix.
BYTES_PER_PARAMETER = 18


def require_memory(config: ModelConfig) -> None:
    """Raise InputError where a check needs more memory than this machine has."""
    needed = BYTES_PER_PARAMETER * parameter_count(config)
    there = host_memory()
    if needed > there:
        raise InputError(
            f"--verify-every needs some {gib(needed)} of host memory for a model of "
            f"this size, and this machine has {gib(there)}; leave it out"
        )


def check(model: Llama, batches: Sequence[Batch], z_loss: float) -> list[BoundedError]:
    """Return errors and bounds of a model on parts of a training step's micro-batches.

    Parameters and gradients are left as they were.
    """
    picked = pick(batches)
    weight = model.head_weight
    with without_float8(model):
        found = bound_errors(
            model.config,
            dict(model.named_parameters()),
            picked,
            observe(model, picked, z_loss),
            arithmetic(weight.device, weight.dtype),
            z_loss,
        )
    error, bound = embedding_error(model, batches[0], z_loss, LAMBDA)
    found.append(BoundedError("gradients", error, bound, EMBED))
    return [*found, *float8_errors(model, batches[0].tokens)] if uses_float8(model) else found


def pick(batches: Sequence[Batch]) -> list[Batch]:
    """Return a step's first micro-batches, with no targets but those that PARTS keeps."""
    picked = []
    for batch, (rows, length) in zip(batches, PARTS, strict=False):
        targets = torch.full_like(batch.targets, IGNORE_INDEX)
        targets[:rows, :length] = batch.targets[:rows, :length]
        if not count_valid(targets):  # without a valid target, the tokens are the targets
            targets[:rows, :length] = batch.tokens[:rows, :length]
        picked.append(batch._replace(targets=targets))
    return picked


def observe(model: Llama, batches: Sequence[Batch], z_loss: float) -> Observed:
    """Return logits, loss and gradients of a training step; parameters and gradients are kept."""
    hidden: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda *call: hidden.append(call[2][0].detach()))
    try:
        with gradients_aside(model):
            loss, grads = step.accumulate(model, batches, TokenLoss(z_loss))
            named = {name: grads[p].cpu() for name, p in model.named_parameters() if p in grads}
            with torch.no_grad():
                parts = zip(hidden, PARTS, strict=False)
                logits = [model.head(x_BTD[:rows, :n]).cpu() for x_BTD, (rows, n) in parts]
    finally:
        hook.remove()
    return Observed(logits, loss.item(), named)


def arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """Return the precision of matrix products: float32 ones may be allowed to be tf32 or less.

    Asked of a product of many rows. Some processors multiply a few rows more precisely, which
    the wider bound allows.
    """
    if dtype == torch.float32:
        one = torch.eye(256, device=device)
        for name, small in {"float32": 2.0**-20, "tf32": 2.0**-9}.items():
            matrix = torch.full_like(one, 1 + small)
            if torch.equal(matrix @ one, matrix):
                return name
    return "bfloat16"


def worst_errors(checked: Sequence[BoundedError]) -> dict[str, tuple[float, float]]:
    """Return the worst error and its bound, by quantity."""
    return {name: (one.error, one.bound) for name, one in worst_of_each(checked).items()}


def complaint(measures: Sequence[BoundedError], out: Path, done: int) -> str:
    """Return a line that names the errors over their bounds after step ``done``, and a remedy."""
    broken = [measure for measure in measures if not measure.holds]
    parts = []
    for quantity, worst in worst_of_each(broken).items():
        n = sum(measure.quantity == quantity for measure in broken)
        name = f"{n} gradients, worst of {worst.parameter}" if worst.parameter else quantity
        parts.append(f"{name}: error {worst.error:.1e}, bound {worst.bound:.1e}")
    where = "no checkpoint was saved yet"
    if (out / MODEL_FILE).exists():
        flags = "" if any(measure.quantity == "logits" for measure in broken) else " --grads"
        model = shlex.quote(str(out / MODEL_FILE))
        where = f"try the last checkpoint with: python tools/compare.py {model}{flags}"
    return (
        f"step {done}: the model does not compute what the oracle does ({'; '.join(parts)}); "
        f"this step was not saved; {where}"
    )
