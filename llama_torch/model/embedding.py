"""Token embedding whose gradient is summed in float32 or wider on every device.

Suffixes: B batch, T position, P positions of all rows, V vocabulary, D dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_BFLOAT16_SUM = 3072  # tokens, up to which torch's CUDA kernel is the one that adds in bfloat16


class Embedding(nn.Embedding):
    """``nn.Embedding`` whose gradient is summed in float32 or wider."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        self.look_up: Callable[[Tensor, Tensor], Tensor] | None = None  # tensor_parallel's
        super().__init__(vocab_size, dim)

    def reset_parameters(self) -> None:
        """Draw the weights, but not on the meta device, where torch would import for seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of tokens, int64 [B, T]."""
        return (self.look_up or embed)(tokens_BT, self.weight)


def embed(tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the embeddings [B, T, D] of tokens; the gradient is summed in float32 or wider.

    torch's CPU kernel adds the gradients of a token's occurrences in the weight's own precision:
    in bfloat16 a sum of ones stops at 256. Its CUDA kernel for few tokens does the same with the
    sums of every 32; its kernel for many adds in float32.
    """
    is_narrow = weight_VD.dtype in (torch.bfloat16, torch.float16)
    is_wide_kernel = weight_VD.is_cuda and tokens_BT.numel() > MAX_BFLOAT16_SUM
    if is_narrow and not is_wide_kernel and weight_VD.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Float32SumEmbedding.apply(tokens_BT, weight_VD)
        return found
    return F.embedding(tokens_BT, weight_VD)


class _Float32SumEmbedding(torch.autograd.Function):
    """Embedding lookup whose gradient is a float32 sum, rounded once."""

    @staticmethod
    def forward(ctx: Any, tokens_BT: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.vocab_size = len(weight_VD)
        return F.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[None, Tensor]:
        (tokens_BT,) = ctx.saved_tensors
        return None, sum_by_token(tokens_BT.flatten(), d_out[0].flatten(0, -2), ctx.vocab_size)


def sum_by_token(tokens_P: Tensor, d_PD: Tensor, vocab_size: int) -> Tensor:
    """Return the sum [V, D] of the rows of ``d`` of each token, in float32 and rounded once.

    On a CPU, allocating a float32 [V, D] would take longer than the sums: there the rows of a
    token are summed into the row of one of its occurrences, and its other rows stay zero.
    """
    if tokens_P.is_cuda:
        kernel = torch.ops.aten.embedding_dense_backward
        wide_VD: Tensor = kernel(d_PD.float(), tokens_P, vocab_size, -1, False)
        return wide_VD.to(d_PD.dtype)
    chosen_V = tokens_P.new_zeros(vocab_size)
    chosen_V[tokens_P] = torch.arange(len(tokens_P), device=tokens_P.device)
    sums_PD = torch.zeros_like(d_PD, dtype=torch.float32)
    sums_PD.index_add_(0, chosen_V[tokens_P], d_PD.float())
    found_VD = d_PD.new_zeros(vocab_size, d_PD.shape[-1])
    return found_VD.index_add_(0, tokens_P, sums_PD.to(d_PD.dtype))
