"""Next-token cross-entropy and its backward pass, in chunks of positions.

Logits of one chunk are in memory at a time: with a vocabulary of 50,257 the logits of a training
step are larger than the model. On a CPU they are computed for positions with a target alone.

Suffixes: B batch, T position, P positions of a chunk (not key/value heads), D dim, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .vocab_part import VocabPart

IGNORE_INDEX = -100  # a target that is left out of the loss, as in torch's cross_entropy

# Bytes of a chunk's logits. A GPU needs larger products for its full speed, and has more memory.
CHUNK_BYTES = 1 << 26
CHUNK_BYTES_CUDA = 1 << 29
ROWS = 16  # rows of logits differentiated at a time on a CPU: they fit its cache
# Rows of logits are padded to a multiple of this many elements: products of unaligned rows take
# 1.5 times as long, on a CPU (a cache line of float32) and on a GPU (bfloat16 tensor cores).
ROW_MULTIPLE = 64


def _learnt(hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden [P, D] and targets [P] of the positions with a target, and their indices.

    None in place of the indices: they are all positions, without a target or with one. On a GPU,
    where their number would have to be waited for, they are.
    """
    hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    if targets.is_cuda:
        return hidden, targets, None
    index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    if len(index) == len(targets):
        return hidden, targets, None
    return hidden[index], targets[index], index


def _chunks(hidden: Tensor, vocab_size: int, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden [P, D] and targets [P] of chunks whose logits fit CHUNK_BYTES.

    They are given as [..., D] and [...]. All chunks have the same size, but the last, which may
    be smaller.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    n_bytes = CHUNK_BYTES_CUDA if hidden.is_cuda else CHUNK_BYTES
    n_chunks = -(-len(targets) // max(1, n_bytes // (vocab_size * hidden.itemsize)))
    rows = max(1, -(-len(targets) // max(1, n_chunks)))
    return zip(hidden.split(rows), targets.split(rows), strict=True)


def loss_sum(
    hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Return the sum of ``-log p(target)``, in nats, over targets other than IGNORE_INDEX.

    ``hidden_BTD`` is the normed residual stream, ``head_VD`` the vocabulary projection,
    ``targets_BT`` int64. ``z_loss * (log Z)^2`` is added for each target, which keeps the
    normaliser Z near one (Chowdhery et al. 2022, section 5). Computed in float32 or wider; the sum
    is a float64 scalar. Of a sharded ``head_VD`` the call is collective, and not differentiable.
    """
    part = VocabPart(head_VD)
    total = torch.zeros((), dtype=torch.float64, device=hidden_BTD.device)
    hidden_PD, targets_P, _ = _learnt(hidden_BTD, targets_BT)
    for hidden, targets in _chunks(hidden_PD, part.n_most, targets_P):
        if part.is_whole:
            nats = _nats(_upcast(F.linear(hidden, head_VD)), targets, z_loss)
        else:
            logits = _upcast(F.linear(hidden, part.weight_VD))
            column, is_here = part.columns(targets)
            target_logit = logits.gather(1, column[:, None])[:, 0].where(is_here, 0)
            sums = part.exponentials_(logits, target_logit)
            nats = sums.nats(z_loss).where(targets != IGNORE_INDEX, 0)
        total = total + nats.sum(dtype=torch.float64)
    return total


def _nats(logits_PV: Tensor, targets_P: Tensor, z_loss: float) -> Tensor:
    """Return the loss [P] of logits of the whole vocabulary, differentiable.

    torch's cross_entropy on a CPU adds up a row's exponentials in line, in float32: of 50,000 small
    ones beside a likely token many are lost, and a loss of 0.002 comes out as 0.0018.
    """
    is_valid = targets_P != IGNORE_INDEX
    largest = logits_PV.detach().amax(-1, keepdim=True)
    shifted_PV = logits_PV - largest
    log_sum = shifted_PV.exp().sum(-1).log()
    nats = log_sum - shifted_PV.gather(1, targets_P.clamp(min=0)[:, None])[:, 0]
    if z_loss:
        nats = nats + z_loss * (log_sum + largest[:, 0]).square()
    return nats.where(is_valid, 0)


@torch.no_grad()
def backward_loss(
    hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, divisor: float, z_loss: float = 0.0
) -> Tensor:
    """Run the backward pass of ``L = loss_sum / divisor`` through head and model; return L.

    hidden_BTD  the model's normed residual stream, with its autograd graph.
    head_VD     the vocabulary projection. With tensor parallelism its rows are sharded; the call
                is collective, and gives the hidden states the gradient of these rows alone.
    targets_BT  int64, IGNORE_INDEX where a position has no target.
    divisor     the number of valid targets of the whole training step: micro-batches with
                different numbers must share it, or the result is a mean of means.

    L is a float64 scalar in nats; gradients are added to every parameter's ``grad``. Per chunk the
    logits are replaced by dL/dlogits, and dL/dhead and dL/dhidden are computed from it. Then one
    ``hidden.backward(dL/dhidden)`` runs through the model.
    """
    part = VocabPart(head_VD)
    weight_VD = _pad_head(part.weight_VD)
    total = torch.zeros((), dtype=torch.float64, device=head_VD.device)
    hidden_PD, targets_P, index = _learnt(hidden_BTD, targets_BT)
    d_hidden_PD = torch.empty_like(hidden_PD)
    d_head, start = None, 0
    if head_VD.dtype != torch.bfloat16:  # else chunks are summed in float32
        d_head = part.gradient()
    for hidden, targets in _chunks(hidden_PD, part.n_most, targets_P):
        logits_PV = _logits(hidden, weight_VD)
        total += _logits_to_grad_(logits_PV, targets, part, 1 / divisor, z_loss)
        torch.mm(logits_PV, weight_VD, out=d_hidden_PD[start : start + len(hidden)])
        d_head = _add_product(d_head, logits_PV, hidden)
        start += len(hidden)
    assert d_head is not None
    if head_VD.dtype == torch.bfloat16:
        part.add_gradient(d_head[: len(part.weight_VD)].to(head_VD.dtype))
    if index is not None:
        d_hidden = hidden_BTD.new_zeros(targets_BT.numel(), hidden_PD.shape[1])
        d_hidden_PD = d_hidden.index_copy_(0, index, d_hidden_PD)
    hidden_BTD.backward(d_hidden_PD.view_as(hidden_BTD))
    return total


def _pad_head(weight_VD: Tensor) -> Tensor:
    """Return the head, in bfloat16 on a GPU with zero rows up to a multiple of ROW_MULTIPLE.

    The copy takes less than a hundredth of the products' time; checkpoints have no padding.
    """
    padding = -len(weight_VD) % ROW_MULTIPLE
    if not padding or weight_VD.dtype != torch.bfloat16 or not weight_VD.is_cuda:
        return weight_VD
    return F.pad(weight_VD, (0, 0, 0, padding))


def _logits(hidden_PD: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the logits [P, V] of a chunk, on a CPU in a buffer of aligned rows."""
    if hidden_PD.is_cuda:
        return hidden_PD @ weight_VD.T
    n_rows, vocab_size = len(hidden_PD), len(weight_VD)
    width = vocab_size + -vocab_size % ROW_MULTIPLE
    padded = _buffer(n_rows * width, hidden_PD.dtype).view(n_rows, width)
    # oneDNN's bfloat16 product on a CPU with AMX reads these columns too, and multiplies them by
    # zero: NaN or infinity in memory that was never written would make the product NaN.
    padded[:, vocab_size:] = 0
    return torch.mm(hidden_PD, weight_VD.T, out=padded[:, :vocab_size])


@functools.lru_cache(maxsize=1)
def _cached_buffer(power_of_two: int, dtype: torch.dtype) -> Tensor:
    """Return the buffer of the last call if that had the same arguments, else a new one."""
    return torch.empty(power_of_two, dtype=dtype)


def _buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """Return a buffer [elements], reused by later calls: new memory costs page faults."""
    return _cached_buffer(1 << (elements - 1).bit_length(), dtype)[:elements]


def _add_product(total: Tensor | None, d_logits_PV: Tensor, hidden_PD: Tensor) -> Tensor:
    """Return ``total + d_logits^T hidden`` [V, D]; a bfloat16 product is added in float32."""
    if total is None:
        return d_logits_PV.T @ hidden_PD
    if d_logits_PV.dtype == torch.bfloat16:
        return _upcast(total).add_(d_logits_PV.T @ hidden_PD)
    return total.addmm_(d_logits_PV.T, hidden_PD)


def _logits_to_grad_(
    logits_PV: Tensor, targets_P: Tensor, part: VocabPart, scale: float, z_loss: float
) -> Tensor:
    """Replace the logits by d(scale * loss)/d(logits), in place; return ``scale * loss``.

    The loss is that of ``loss_sum`` over the chunk; ``scale * loss`` is a float64 scalar. The
    logits are those of ``part``; columns after them are padding, whose probabilities and gradients
    are zero.
    """
    vocab_size, is_whole = len(part.weight_VD), part.is_whole
    kernel = _kernel() if logits_PV.is_cuda and logits_PV.dtype != torch.float64 else None
    if kernel and is_whole:
        loss: Tensor = kernel.differentiate(logits_PV, targets_P, vocab_size, scale, z_loss)
        return loss
    total = torch.zeros((), dtype=torch.float64, device=logits_PV.device)
    # Processes that share the vocabulary exchange a chunk's sums at once.
    rows = ROWS if is_whole and not logits_PV.is_cuda else len(targets_P)
    for logits, targets in zip(logits_PV.split(rows), targets_P.split(rows), strict=True):
        total += _rows_to_grad_(logits[:, :vocab_size], targets, part, scale, z_loss)
        logits[:, vocab_size:] = 0
    return total


def _rows_to_grad_(
    logits_PV: Tensor, targets_P: Tensor, part: VocabPart, scale: float, z_loss: float
) -> Tensor:
    """Replace logits without padding by their gradient, in torch; return ``scale * loss``.

    d(loss)/d(logits) = softmax * (1 + 2 z_loss log Z) - one_hot(target).
    """
    upcast = _upcast(logits_PV)  # the same tensor if float32 or float64
    row = torch.arange(len(targets_P), device=targets_P.device)
    is_valid, (column, is_here) = targets_P != IGNORE_INDEX, part.columns(targets_P)
    sums = part.exponentials_(upcast, upcast[row, column].where(is_here, 0))
    factor = is_valid.to(upcast.dtype) * scale
    upcast.mul_((factor * (1 + 2 * z_loss * sums.log_z) / sums.exp_sum)[:, None])
    upcast[row, column] -= factor * is_here
    if upcast is not logits_PV:
        logits_PV.copy_(upcast)
    return sums.nats(z_loss).where(is_valid, 0).sum(dtype=torch.float64) * scale


@functools.cache
def _kernel() -> Any:
    """Return the module of the Triton kernel, or None where triton is not installed."""
    try:
        from ..kernels import cross_entropy
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None  # only torch's CUDA builds install triton
    return cross_entropy


def _upcast(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def count_valid(targets_BT: Tensor) -> int:
    """Return the number of targets other than IGNORE_INDEX."""
    return int((targets_BT != IGNORE_INDEX).sum())
