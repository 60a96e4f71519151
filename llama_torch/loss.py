"""Next-token cross-entropy without ever holding all the logits.

Axes: B batch, T position, D dim, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that does not count, torch's own convention

# Logits computed at a time. With a vocabulary of 50,257 the logits of one step outweigh the
# whole model; in pieces they stay in a fraction of that, which is also faster.
CHUNK_ELEMENTS = 1 << 25


def _pieces(
    hidden_BTD: Tensor, vocab_size: int, targets_BT: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield groups of positions whose logits fit CHUNK_ELEMENTS."""
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    hidden, targets = hidden_BTD.flatten(0, 1).split(rows), targets_BT.flatten().split(rows)
    return zip(hidden, targets, strict=True)


def _piece_loss(hidden: Tensor, head_VD: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = F.linear(hidden, head_VD)
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    if z_loss:
        log_z = logits.logsumexp(-1)
        loss = loss + z_loss * (log_z.square() * (targets != IGNORE)).sum()
    return loss


def loss_sum(
    hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Return the summed ``-log p(target)`` in nats over targets other than IGNORE.

    ``z_loss`` adds that many times (log Z)^2, which keeps the normaliser Z near one (PaLM,
    section 5). Computed in float32 or wider; summed over the pieces in float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden_BTD.device)
    for hidden, targets in _pieces(hidden_BTD, head_VD.shape[0], targets_BT):
        total = total + _piece_loss(hidden, head_VD, targets, z_loss)
    return total


def backward_loss(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    n_valid: int,
    z_loss: float = 0.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Add the gradient of ``loss_sum / n_valid`` to every parameter; return that loss.

    ``n_valid`` counts the valid targets of the whole step: micro-batches with different
    counts must share one divisor, or a mean of means results. Each piece of logits is
    differentiated and dropped before the next is made; their gradients meet in ``hidden``,
    from which one backward pass runs through the model.
    """
    leaf = hidden_BTD.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=hidden_BTD.device)
    for hidden, targets in _pieces(leaf, head_VD.shape[0], targets_BT):
        with autocast():  # around the forward part alone, as torch advises
            loss = _piece_loss(hidden, head_VD, targets, z_loss) / n_valid
        loss.backward()
        total += loss.detach()
    hidden_BTD.backward(leaf.grad)
    return total


def count_valid(targets_BT: Tensor) -> int:
    """Return how many targets count."""
    return int((targets_BT != IGNORE).sum())
