"""Matrix products in fp8 with one scale for each tensor, and their gradients.

Micikevicius et al. 2022, "FP8 formats for deep learning", table 1: E4M3 has 3 bits of mantissa and
no infinity, its largest value is 448 and its smallest normal one 2^-6; E5M2 has 2 bits, 57,344 and
2^-14. Here a scale is a power of two, so that it adds no rounding.

Axes: M tokens, K input features, N output features.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .ops import Array


class Format(NamedTuple):
    """A floating-point format: bits of mantissa, smallest normal exponent, largest value."""

    mantissa: int
    smallest_exponent: int
    largest: float


E4M3 = Format(3, -6, 448.0)
E5M2 = Format(2, -14, 57344.0)


def round_to(x: Array, form: Format) -> Array:
    """Return x rounded to the nearest values of a format, ties to even; what is larger saturates.

    Below the smallest normal value the spacing stays (subnormal values). NaN stays NaN.
    """
    exponent = np.maximum(np.frexp(x)[1] - 1, form.smallest_exponent)  # frexp: in [0.5, 1)
    spacing = np.ldexp(1.0, exponent - form.mantissa)
    rounded: Array = np.clip(np.round(x / spacing) * spacing, -form.largest, form.largest)
    return rounded


def quantize(x: Array, form: Format) -> tuple[Array, float]:
    """Return values of a format [...] and their scale: ``x ~ values * scale``.

    The scale is the smallest power of two with which the largest value of the whole tensor is in
    the format's range; that of a tensor below 2^-100 is that of 2^-100. With a value that is not
    finite all values and the scale are NaN.
    """
    largest = max(float(np.max(np.abs(x))), 2.0**-100)
    if not math.isfinite(largest):
        return np.full(x.shape, math.nan), math.nan
    scale = 2.0 ** -math.floor(math.log2(form.largest / largest))
    if form.largest * scale < largest:  # log2 was rounded up
        scale *= 2
    return round_to(x / scale, form), scale


def product(x: Array, weights: Sequence[Array]) -> Array:
    """Return ``q(x) q(W)^T``, both in E4M3: [..., K], matrices [n, K] -> [..., N].

    The matrices are put one below another and have one scale.
    """
    x8, x_scale = quantize(x, E4M3)
    w8, w_scale = quantize(np.concatenate(weights), E4M3)
    out: Array = x8 @ w8.T * (x_scale * w_scale)
    return out


def product_vjp(x: Array, weights: Sequence[Array], d_out: Array) -> tuple[Array, list[Array]]:
    """Return the gradients of ``product``: ``q(d) q(W)`` [..., K] and ``q(d)^T q(x)``, each [n, K].

    The gradient d_out [..., N] is in E5M2; the casts have the gradient of the identity.
    """
    x8, x_scale = quantize(x, E4M3)
    w8, w_scale = quantize(np.concatenate(weights), E4M3)
    d8, d_scale = quantize(d_out, E5M2)
    d_x: Array = d8 @ w8 * (d_scale * w_scale)
    flat = d8.reshape(-1, d8.shape[-1]), x8.reshape(-1, x8.shape[-1])
    d_weight = flat[0].T @ flat[1] * (d_scale * x_scale)
    ends = np.cumsum([weight.shape[0] for weight in weights])[:-1]
    return d_x, np.split(d_weight, ends)
