"""Triton kernel that replaces logits by the gradient of their cross-entropy, in place.

Suffixes: N position of a chunk (not key/value heads), V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time; a row is read from memory once and from the cache again


@triton.jit
def _row(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    width,
    vocab_size,
    scale,
    z_loss,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute log Z of one row of logits, then replace the row by its gradient.

    gradient = scale * (softmax * (1 + 2 z_loss log Z) - one_hot(target)), of the loss
    log Z - logit(target) + z_loss (log Z)^2, which is stored without ``scale``.

    logits_ptr   [N, width]; columns from ``vocab_size`` on are padding, and become zero.
    targets_ptr  int64 [N]; the rows of IGNORE become zero.
    losses_ptr   float32 [N], written.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(losses_ptr + row, 0.0)
        for start in range(0, width, BLOCK):
            at = start + columns
            zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + at, zeros, mask=at < width)
    else:
        # Every lane has its own running maximum and sum (online softmax, Milakov and Gimelshein
        # 2018), so that no step waits for a reduction over lanes.
        most = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, x)
            total = total * tl.exp(most - higher) + tl.exp(x - higher)
            most = higher
        top = tl.max(most, 0)
        log_z = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
        of_target = tl.load(logits_ptr + target).to(tl.float32)
        tl.store(losses_ptr + row, log_z - of_target + z_loss * log_z * log_z)
        factor = 1 + 2 * z_loss * log_z
        for start in range(0, width, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
            d = tl.exp(x - log_z) * factor - tl.where(at == target, 1.0, 0.0)
            d = (d * scale).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + at, d, mask=at < width)


def differentiate(
    logits_NV: Tensor, targets_N: Tensor, vocab_size: int, scale: float, z_loss: float
) -> Tensor:
    """Replace contiguous logits [N, width] by d(scale * loss)/d(logits); return ``scale * loss``.

    The loss is summed over positions, as a float64 scalar. The arguments are those of
    ``_logits_to_grad_`` in model/loss.py; logits are float32 or narrower, and the computation is
    in float32.
    """
    n_rows, width = logits_NV.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits_NV.device)
    # loss.IGNORE_INDEX, which cannot be imported here: loss.py imports this module.
    _row[(n_rows,)](
        logits_NV,
        targets_N.contiguous(),
        losses,
        width,
        vocab_size,
        scale,
        z_loss,
        IGNORE=-100,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return losses.sum(dtype=torch.float64) * scale
