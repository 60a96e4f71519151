"""One training step: loss and gradients over micro-batches, clipping, AdamW update."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..distributed.parallel import Parallel
from ..model.llama import Llama
from .batch import Batch
from .clip import global_norm, scale_
from .objective import Objective, TokenLoss
from .optimizer import MasterAdamW


def accumulate(
    model: Llama,
    batches: Sequence[Batch],
    objective: Objective | None = None,
    parallel: Parallel | None = None,
) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Return a training step's loss, a float64 scalar, and the gradient of every parameter.

    The loss is the objective's (None: the next token's, in nats per token), a mean over all
    micro-batches of all processes: each micro-batch's sum is divided by the total count, so that
    the split of a step into micro-batches changes rounding alone. Gradients are keyed by parameter,
    and have its shape and dtype; bfloat16 gradients of several micro-batches are summed in float32.
    What else the step measures is the objective's ``latest``. Raises InputError where there is
    nothing to learn.
    """
    parallel, objective = parallel or Parallel(), objective or TokenLoss()
    each = zip(*map(objective.counts, batches), strict=True)
    counts = parallel.all_reduce_sum(*map(sum, each))
    if counts[0] == 0:
        raise InputError("a training step without a single valid target has no loss")
    # DDP and FSDP average over data ranks: dividing by count / data_size here gives the sum over
    # all processes / count.
    divisors = [max(count, 1) / parallel.data_size for count in counts]
    parameters: list[Tensor] = list(model.parameters())
    device = parameters[0].device
    total = torch.zeros(1 + len(objective.names), dtype=torch.float64, device=device)
    sums: dict[Tensor, Tensor] = {}
    accumulate_in_float32 = parameters[0].dtype == torch.bfloat16 and len(batches) > 1
    for number, batch in enumerate(batches, 1):
        on_device = batch.to(device)
        tokens, _, positions, mask = on_device
        sync_grads = number == len(batches) and not accumulate_in_float32
        with parallel.micro_batch(model, sync_grads):
            hidden = parallel.forward_hidden(model, tokens, positions, mask, sync_grads=sync_grads)
            total += objective.backward(hidden, model.head_weight, on_device, divisors)
        grads = {p: p.grad for p in parameters if p.grad is not None}
        if accumulate_in_float32:
            for parameter, grad in grads.items():
                sums[parameter] = sums[parameter].add_(grad) if parameter in sums else grad.float()
                parameter.grad = None
    # The losses and the float32 sums are of this process alone, and divided by ``divisors``.
    parallel.all_reduce_mean_([total, *sums.values()])
    objective.latest = total[1:]
    return total[0], sums or grads


def clip_and_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    grads: Mapping[Tensor, Tensor],
    *,
    lr: float,
    grad_clip: float,
    accept: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Clip the gradients, update, and clear them; return their norm before clipping, a scalar.

    The gradients are scaled to a global 2-norm of at most ``grad_clip`` (section 2.2). If
    ``accept`` returns false for the norm, neither parameters nor moments are updated.
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
    # On a CPU, allocating gradients takes longer than clearing them; on a GPU the memory is freed.
    optimizer.zero_grad(set_to_none=norm.is_cuda)
    return norm


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    lr: float,
    grad_clip: float,
    objective: Objective | None = None,
    accept: Callable[[Tensor, Tensor], bool] | None = None,
    parallel: Parallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one training step over the micro-batches; return mean loss and gradient norm, scalars.

    ``accept`` receives both before the update, and returns whether to update.
    """
    loss, grads = accumulate(model, batches, objective, parallel)
    allow = None if accept is None else partial(accept, loss)
    return loss, clip_and_step(model, optimizer, grads, lr=lr, grad_clip=grad_clip, accept=allow)
