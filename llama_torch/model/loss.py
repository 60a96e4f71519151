"""Next-token cross-entropy, computed in pieces: all the logits are never in memory at once.

Suffixes: B batch, T position, N positions of a piece (not key/value heads), D dim, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is left out of the loss, as in torch's cross_entropy

# Bytes of logits in memory at a time. With a vocabulary of 50,257 the logits of a training step
# are larger than the model. A GPU needs larger products for its full speed, and has more memory.
CHUNK_BYTES = 1 << 26
CHUNK_BYTES_CUDA = 1 << 29
ROWS = 16  # rows of logits differentiated at a time on a CPU: they stay in its cache
# Rows of logits are padded to a multiple of this many elements: products of unaligned rows take
# half as long again, on a CPU (a cache line of float32) and on a GPU (bfloat16 tensor cores).
ALIGNED = 64


def _pieces(
    hidden_BTD: Tensor, vocab_size: int, targets_BT: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden [N, D] and targets [N] in pieces of one size whose logits fit CHUNK_BYTES."""
    hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    n_bytes = CHUNK_BYTES_CUDA if hidden.is_cuda else CHUNK_BYTES
    n_pieces = -(-len(targets) // max(1, n_bytes // (vocab_size * hidden.itemsize)))
    rows = max(1, -(-len(targets) // max(1, n_pieces)))
    return zip(hidden.split(rows), targets.split(rows), strict=True)


def loss_sum(
    hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Return the summed ``-log p(target)`` in nats over targets other than IGNORE.

    ``z_loss`` adds that many times (log Z)^2, which keeps the normaliser Z near one (PaLM,
    section 5). Computed in float32 or wider; summed in float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden_BTD.device)
    for hidden, targets in _pieces(hidden_BTD, head_VD.shape[0], targets_BT):
        logits = _wide(F.linear(hidden, head_VD))
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        if z_loss:
            log_z = logits.logsumexp(-1)
            loss = loss + z_loss * (log_z.square() * (targets != IGNORE))
        total = total + loss.sum(dtype=torch.float64)
    return total


@torch.no_grad()
def backward_loss(
    hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, n_valid: float, z_loss: float = 0.0
) -> Tensor:
    """Run the backward pass of ``loss_sum / n_valid`` through head and model; return that loss.

    ``hidden_BTD`` is the model's output, with its graph; ``head_VD`` the vocabulary projection;
    ``targets_BT`` int64. Gradients are added to every parameter's ``grad``; the loss is a float64
    scalar in nats. ``n_valid`` is the divisor of a whole training step: micro-batches with
    different counts of valid targets must share it, or a mean of means results.

    Per piece: logits -> dL/dlogits in place; dL/dhead and dL/dhidden are accumulated. Then one
    hidden.backward(dL/dhidden) runs through the model.
    """
    weight_VD = _aligned(head_VD)
    total = torch.zeros((), dtype=torch.float64, device=head_VD.device)
    d_hidden_ND = torch.empty_like(hidden_BTD).flatten(0, 1)
    pieces = _pieces(hidden_BTD, len(head_VD), targets_BT)
    d_head, at = None, 0
    if head_VD.dtype != torch.bfloat16:  # wide enough to accumulate in
        head_VD.grad = torch.zeros_like(head_VD) if head_VD.grad is None else head_VD.grad
        d_head = head_VD.grad
    for hidden_ND, targets_N in pieces:
        logits_NV = _logits(hidden_ND, weight_VD)
        total += _differentiate(logits_NV, targets_N, len(head_VD), 1 / n_valid, z_loss)
        torch.mm(logits_NV, weight_VD, out=d_hidden_ND[at : at + len(hidden_ND)])
        d_head = _add_product(d_head, logits_NV, hidden_ND)
        at += len(hidden_ND)
    assert d_head is not None
    if d_head is not head_VD.grad:
        d_head = d_head[: len(head_VD)].to(head_VD.dtype)
        head_VD.grad = d_head if head_VD.grad is None else head_VD.grad.add_(d_head)
    hidden_BTD.backward(d_hidden_ND.view_as(hidden_BTD))
    return total


def _aligned(head_VD: Tensor) -> Tensor:
    """Return the head with zero rows up to a multiple of ALIGNED, for bfloat16 on a GPU.

    The copy takes less than one hundredth of the products' time; checkpoints hold no padding.
    """
    padding = -len(head_VD) % ALIGNED
    if not padding or head_VD.dtype != torch.bfloat16 or not head_VD.is_cuda:
        return head_VD.detach()
    return F.pad(head_VD.detach(), (0, 0, 0, padding))


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    if hidden_ND.is_cuda:
        return hidden_ND @ weight_VD.T
    n_rows, vocab_size = len(hidden_ND), len(weight_VD)
    width = vocab_size + -vocab_size % ALIGNED
    padded = _buffer(n_rows * width, hidden_ND.dtype).view(n_rows, width)
    # oneDNN's bfloat16 product on a CPU with AMX reads these columns too, and multiplies them by
    # zero, which makes NaN of the NaN or infinity that memory never written may hold.
    padded[:, vocab_size:] = 0
    return torch.mm(hidden_ND, weight_VD.T, out=padded[:, :vocab_size])


@functools.lru_cache(maxsize=1)
def _kept(power_of_two: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(power_of_two, dtype=dtype)


def _buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """Return a buffer [elements], reused between training steps: new memory costs page faults."""
    return _kept(1 << (elements - 1).bit_length(), dtype)[:elements]


def _add_product(total: Tensor | None, d_logits_NV: Tensor, hidden_ND: Tensor) -> Tensor:
    """Return total + d_logits^T hidden [V, D]; a sum of several pieces is float32 or wider."""
    if total is None:
        return d_logits_NV.T @ hidden_ND
    if d_logits_NV.dtype == torch.bfloat16:
        return _wide(total).add_(d_logits_NV.T @ hidden_ND)
    return total.addmm_(d_logits_NV.T, hidden_ND)


def _differentiate(
    logits_NV: Tensor, targets_N: Tensor, vocab_size: int, scale: float, z_loss: float
) -> Tensor:
    """Replace logits by the gradient of ``scale`` times their loss, in place; return that loss.

    Columns from ``vocab_size`` on are padding: probability and gradient are zero.
    """
    kernel = _kernel() if logits_NV.is_cuda and logits_NV.dtype != torch.float64 else None
    if kernel:
        loss: Tensor = kernel.differentiate(logits_NV, targets_N, vocab_size, scale, z_loss)
        return loss
    total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
    rows = len(targets_N) if logits_NV.is_cuda else ROWS
    for logits, targets in zip(logits_NV.split(rows), targets_N.split(rows), strict=True):
        total += _differentiate_rows(logits[:, :vocab_size], targets, scale, z_loss)
        logits[:, vocab_size:] = 0
    return total


def _differentiate_rows(
    logits_NV: Tensor, targets_N: Tensor, scale: float, z_loss: float
) -> Tensor:
    wide = _wide(logits_NV)  # itself, unless it was narrow
    row = torch.arange(len(targets_N), device=targets_N.device)
    target, is_valid = targets_N.clamp(min=0), targets_N != IGNORE
    of_target, top = wide[row, target], wide.amax(-1)
    sums = wide.sub_(top[:, None]).exp_().sum(-1)
    log_z = top + sums.log()
    nats = log_z - of_target + z_loss * log_z.square()
    factor = is_valid.to(wide.dtype) * scale
    wide.mul_((factor * (1 + 2 * z_loss * log_z) / sums)[:, None])
    wide[row, target] -= factor
    if wide is not logits_NV:
        logits_NV.copy_(wide)
    return nats.where(is_valid, 0).sum(dtype=torch.float64) * scale


@functools.cache
def _kernel() -> Any:
    try:
        from ..kernels import cross_entropy
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None  # triton comes with torch's CUDA builds alone
    return cross_entropy


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def count_valid(targets_BT: Tensor) -> int:
    """Return the number of targets other than IGNORE."""
    return int((targets_BT != IGNORE).sum())
