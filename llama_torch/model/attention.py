"""Softmax attention: torch's own, and on a GPU flash attention within documents.

In documents no mask is made or read, and nothing is computed of tokens of two documents. That is
an operation of its own, which torch.compile does not look into: the number of documents and the
length of the longest are read when it runs, so that other documents compile nothing anew.

Suffixes: B batch, T query position, S key position, P places of all rows (B * T), D dim, H query
heads, N key/value heads, K head_dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import Documents, Mask

MOST_HEAD_DIM = 192  # the kernel's backward pass for larger ones is not on every GPU
BLOCK = 128  # queries that the kernel takes at a time


def attend(
    q_BHTK: Tensor,
    k_BNSK: Tensor,
    v_BNSK: Tensor,
    mask: Mask | None,
    is_causal: bool,
    is_grouped: bool,
) -> Tensor:
    """Return ``softmax(q k^T / sqrt(K)) v`` [B, H, T, K] under a mask of ``for_every_head``.

    ``is_grouped`` says whether there are fewer key/value heads than query heads; with Documents
    there is no cache, and S = T.
    """
    if isinstance(mask, Documents):
        given = (x.transpose(1, 2) for x in (q_BHTK, k_BNSK, v_BNSK))
        out_BTHK, _ = attend_in_documents(*given, mask.starts, mask.sizes)
        return out_BTHK.transpose(1, 2)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BNSK, v_BNSK, mask, is_causal=is_causal, enable_gqa=is_grouped
    )


def for_every_head(mask: Mask | None, x_BTD: Tensor, head_dim: int) -> Mask | None:
    """Return a mask [B, T, S] as [B, 1, T, S], for the model with residual stream ``x_BTD``.

    Documents remain what they are where the kernel takes them.
    """
    if isinstance(mask, Documents):
        if has_kernel(x_BTD, head_dim):
            return mask
        mask = mask.dense(len(x_BTD))
    return None if mask is None else mask[:, None]


def has_kernel(x: Tensor, head_dim: int) -> bool:
    """Return whether there is a kernel for documents on the device and in the dtype of ``x``."""
    return (
        x.is_cuda
        and torch.version.hip is None
        and x.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= MOST_HEAD_DIM
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


@torch.library.custom_op("llama_torch::attend_in_documents", mutates_args=())
def attend_in_documents(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return causal attention [B, T, H, K] within documents, and its log-sum-exp, float32 [H, P].

    q, k and v are [B, T, H or N, K]; ``starts`` and ``sizes`` are Documents'.
    """
    q_PHK, k_PNK, v_PNK = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    out_PHK, log_sum_exp = _forward(q_PHK, k_PNK, v_PNK, *_bounds(starts, sizes))
    return out_PHK.view_as(q), log_sum_exp


@attend_in_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    places = q.shape[0] * q.shape[1]
    return q.new_empty(q.shape), q.new_empty((q.shape[2], places), dtype=torch.float32)


@torch.library.custom_op("llama_torch::attend_in_documents_backward", mutates_args=())
def attend_in_documents_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    starts: Tensor,
    sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of ``attend_in_documents``, from that of its result."""
    flat = [x.flatten(0, 1).contiguous() for x in (d_out, q, k, v, out)]
    d_q, d_k, d_v = _backward(flat, log_sum_exp, *_bounds(starts, sizes))
    return d_q.view_as(q), d_k.view_as(k), d_v.view_as(v)


@attend_in_documents_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_in_documents_backward(d_out, *ctx.saved_tensors), None, None


attend_in_documents.register_autograd(_differentiate, setup_context=_keep)


def _bounds(starts: Tensor, sizes: Tensor) -> tuple[Tensor, int]:
    """Return where documents begin and the last ends, int32, and the longest in whole blocks.

    (A longest of 1 would take the kernel's path for decoding.)
    """
    n_documents, longest = sizes.tolist()
    return starts[: n_documents + 1], -(-longest // BLOCK) * BLOCK


def _forward(
    q_PHK: Tensor, k_PNK: Tensor, v_PNK: Tensor, bounds: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Return attention [P, H, K] by torch's kernel, and its log-sum-exp [H, P]."""
    lengths = bounds, bounds, longest, longest
    out_PHK, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        q_PHK, k_PNK, v_PNK, *lengths, 0.0, True, False
    )
    return out_PHK, log_sum_exp


def _backward(
    flat: Sequence[Tensor], log_sum_exp: Tensor, bounds: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v by torch's kernel.

    ``flat`` is the gradient of the result, q, k, v and the result, [P, H or N, K].
    """
    lengths = bounds, bounds, longest, longest
    # The state of a dropout that there is not.
    random = torch.zeros(2, dtype=torch.uint64, device=bounds.device)
    unused = torch.empty(0, device=bounds.device)
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        *flat, log_sum_exp, *lengths, 0.0, True, random, unused
    )
    return d_q, d_k, d_v
