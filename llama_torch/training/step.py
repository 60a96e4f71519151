"""One optimizer step: loss over micro-batches, clipping, AdamW. What the trainer runs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..common.errors import InputError
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from ..model.loss import backward_loss, count_valid
from .batch import Batch
from .clip import global_norm, scale_
from .optimizer import MasterAdamW


def accumulate(
    model: Llama,
    batches: Sequence[Batch],
    z_loss: float = 0.0,
    parallel: Parallel | None = None,
) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Return the step's loss and the gradient of every parameter, by parameter.

    The loss is the mean over every valid target of every batch, of every process in
    ``parallel``: each batch's sum is divided by the count of them all, so that splitting a step
    differently changes nothing but rounding. Gradients have the parameters' dtype; those of
    several batches are summed in float32 or wider. Raises InputError where no target is valid.
    """
    parallel = parallel or Parallel()
    (n_valid,) = parallel.all_reduce_sum(sum(count_valid(batch.targets) for batch in batches))
    if n_valid == 0:
        raise InputError("a training step without a single valid target has no loss")
    parameters: list[Tensor] = list(model.parameters())
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    sums: dict[Tensor, Tensor] = {}
    sums_apart = parameters[0].dtype == torch.bfloat16 and len(batches) > 1
    for number, batch in enumerate(batches, 1):
        tokens, targets, positions, mask = batch.to(device)
        reduces = number == len(batches) and not sums_apart
        with parallel.micro_batch(model, reduces):
            hidden = parallel.hidden(model, tokens, positions, mask, reduces=reduces)
            # Gradients are averaged over processes, which makes of this divisor n_valid.
            count = n_valid / parallel.data_size
            total += backward_loss(hidden, model.head_weight, targets, count, z_loss)
        grads = {p: p.grad for p in parameters if p.grad is not None}
        if sums_apart:
            for parameter, grad in grads.items():
                sums[parameter] = sums[parameter].add_(grad) if parameter in sums else grad.float()
                parameter.grad = None
    parallel.mean([total, *sums.values()])
    return total, sums or grads


def update(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    grads: Mapping[Tensor, Tensor],
    *,
    lr: float,
    grad_clip: float,
    accept: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Clip the gradients, step, and clear them; return their norm before clipping.

    Where ``accept`` of that norm is false nothing is updated, no moment either.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = global_norm(grads.values())
    factor = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
    if accept is None or accept(norm):
        if isinstance(optimizer, MasterAdamW):
            optimizer.update(grads, factor)
        else:
            scale_(grads.values(), factor)
            optimizer.step()
    # On a CPU new memory for gradients takes longer to get than to clear; a GPU's is needed.
    optimizer.zero_grad(set_to_none=norm.is_cuda)
    return norm


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    lr: float,
    grad_clip: float,
    z_loss: float = 0.0,
    accept: Callable[[Tensor, Tensor], bool] | None = None,
    parallel: Parallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step over ``batches``; return mean loss and gradient norm.

    ``accept`` is given both before the update, and may forbid it.
    """
    loss, grads = accumulate(model, batches, z_loss, parallel)
    allow = None if accept is None else partial(accept, loss)
    return loss, update(model, optimizer, grads, lr=lr, grad_clip=grad_clip, accept=allow)
