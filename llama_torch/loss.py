"""Next-token cross-entropy without ever holding all the logits.

Axes: B batch, T position, D dim, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]

IGNORE = -100  # a target that does not count, torch's own convention

# Logits computed at a time. With a vocabulary of 50,257 the logits of one step outweigh the
# whole model; in pieces they stay in a fraction of that, which is also faster.
CHUNK_ELEMENTS = 1 << 25


def _pieces(hidden_BTD: Tensor, vocab_size: int, targets_BT: Tensor) -> Iterator[Batch]:
    """Yield groups of positions whose logits fit CHUNK_ELEMENTS."""
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    hidden, targets = hidden_BTD.flatten(0, 1).split(rows), targets_BT.flatten().split(rows)
    return zip(hidden, targets, strict=True)


def _piece_loss(hidden: Tensor, head_VD: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head_VD).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def loss_sum(hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the summed ``-log p(target)`` in nats over targets other than IGNORE."""
    total = torch.zeros((), device=hidden_BTD.device)
    for hidden, targets in _pieces(hidden_BTD, head_VD.shape[0], targets_BT):
        total = total + _piece_loss(hidden, head_VD, targets)
    return total


def backward_loss(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    n_valid: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Add the gradient of ``loss_sum / n_valid`` to every parameter; return that loss.

    ``n_valid`` counts the valid targets of the whole step: micro-batches with different
    counts must share one divisor, or a mean of means results. Each piece of logits is
    differentiated and dropped before the next is made; their gradients meet in ``hidden``,
    from which one backward pass runs through the model.
    """
    leaf = hidden_BTD.detach().requires_grad_()
    total = torch.zeros((), device=hidden_BTD.device)
    for hidden, targets in _pieces(leaf, head_VD.shape[0], targets_BT):
        with autocast():  # around the forward part alone, as torch advises
            loss = _piece_loss(hidden, head_VD, targets) / n_valid
        loss.backward()
        total += loss.detach()
    hidden_BTD.backward(leaf.grad)
    return total


def count_valid(targets_BT: Tensor) -> int:
    """Return how many targets count."""
    return int((targets_BT != IGNORE).sum())
