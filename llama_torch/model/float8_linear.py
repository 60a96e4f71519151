"""Matrix products of a training step in fp8, with one scale for each tensor.

Micikevicius et al. 2022, "FP8 formats for deep learning": activations and weights are cast to
E4M3, gradients to E5M2, sums are float32. A tensor is multiplied before the cast by the largest
power of two that keeps its largest value in the type's range: no value saturates, and the scale
adds no rounding. Matrices that share their input are one product, with one scale.

Axes: M tokens, K input features, N output features of all matrices together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .llama import Llama, linear_products

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
HAS_TRITON = find_spec("triton") is not None
PAYS_FROM = 2048  # dim; on an H200 768 is slower than bfloat16, 2,048 1.3 times as fast
SMALLEST = 2.0**-100  # below it a largest value is taken for this, so that the multiplier is finite


def multiplier_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest power of two, float32 [], that keeps ``largest`` in the range of dtype."""
    room = torch.finfo(dtype).max / largest.float().clamp(min=SMALLEST)
    return (room.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone


def quantize(matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of matrices in fp8 [M, K], their transpose [K, M], and their scale float32 [].

    ``matrices`` [.., K] are put one below another. Of a value that is not finite the scale is NaN.
    """
    largest = torch.stack([x.abs().amax(-1).amax() for x in matrices]).amax()
    multiplier = multiplier_of(largest, dtype)
    scale = 1 / multiplier + largest.float() * 0
    n_rows, n_columns = sum(x.shape[0] for x in matrices), matrices[0].shape[1]
    # Of float32 tiles Triton 3.6 wrote wrong transposes on an H200.
    by_kernel = HAS_TRITON and all(x.is_cuda and x.dtype == torch.bfloat16 for x in matrices)
    if not by_kernel:
        whole = torch.cat([(x.float() * multiplier).to(dtype) for x in matrices])
        return whole, whole.t().contiguous(), scale
    from ..kernels.float8_cast import cast_float8

    whole = torch.empty(n_rows, n_columns, dtype=dtype, device=largest.device)
    transposed = torch.empty(n_columns, n_rows, dtype=dtype, device=largest.device)
    start = 0
    for x in matrices:
        cast_float8(x.contiguous(), multiplier, whole, transposed, start)
        start += x.shape[0]
    return whole, transposed, scale


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a b^T`` times both scales: fp8 [M, K] and [N, K] to ``dtype`` [M, N]."""
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=a.is_cuda
    )


class Float8Product(torch.autograd.Function):
    """``x W^T`` of one or several matrices W below one another, all three products in fp8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        x8, x8_t, x_scale = quantize([x.reshape(-1, x.shape[-1])], FORWARD)
        w8, w8_t, w_scale = quantize(weights, FORWARD)
        ctx.save_for_backward(x8_t, x_scale, w8_t, w_scale)
        ctx.shape, ctx.rows, ctx.dtype = x.shape, [w.shape[0] for w in weights], weights[0].dtype
        return multiply(x8, x_scale, w8, w_scale, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of x [..., K] and of each matrix."""
        (grad,) = grads
        x8_t, x_scale, w8_t, w_scale = ctx.saved_tensors
        g8, g8_t, g_scale = quantize([grad.reshape(-1, grad.shape[-1])], BACKWARD)
        of_x = multiply(g8, g_scale, w8_t, w_scale, grad.dtype).view(ctx.shape)
        of_weights = multiply(g8_t, g_scale, x8_t, x_scale, ctx.dtype).split(ctx.rows)
        return of_x, *of_weights


def float8_products(x: Tensor, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Return each layer's ``x W^T``, of [..., K], from one product in fp8.

    Without gradients, as in validation, the layers compute in their own precision.
    """
    if not torch.is_grad_enabled():
        return linear_products(x, layers)
    joined: Tensor = Float8Product.apply(x, *(layer.weight for layer in layers))
    return joined.split([layer.out_features for layer in layers], -1)


def use_float8(model: Llama) -> None:
    """Have the blocks of a model compute their matrix products in fp8 wherever it trains.

    Every width, and the number of tokens, must be a multiple of 16.
    """
    for part in _parts(model):
        part.products = float8_products


def uses_float8(model: Llama) -> bool:
    """Return whether ``use_float8`` was called for the model."""
    return any(part.products is float8_products for part in _parts(model))


@contextmanager
def without_float8(model: Llama) -> Iterator[None]:
    """Have a model compute its products in its own precision."""
    before = {part: part.products for part in _parts(model)}
    for part in before:
        part.products = linear_products
    try:
        yield
    finally:
        for part, products in before.items():
            part.products = products


def _parts(model: Llama) -> list[Any]:
    """Return the attentions and feed-forward networks, which have the matrices of the blocks."""
    blocks: list[Any] = list(model.model.layers)
    return [part for block in blocks for part in (block.self_attn, block.mlp)]
