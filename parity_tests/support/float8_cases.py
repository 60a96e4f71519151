"""Drawn products in fp8, and their distance from the oracle's in units of a derived bound."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from llama_torch.model.float8_linear import Float8Product
from reference_np.float8 import E4M3, E5M2, Format, product, product_vjp, quantize
from reference_np.ops import Array

from ..conformance.architectures import seeds
from ..conformance.drawn import Draw, composite, labelled

FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
# Rows of a tensor differ by up to 2^20 in size: values at both ends of the formats occur.
DEPTH = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of a product: x [M, K], matrices [n, K], and the output's gradient [M, N]."""

    x: Tensor
    weights: list[Tensor]
    d_out: Tensor


def tensor(rng: np.random.Generator, rows: int, columns: int, exponent: int) -> Tensor:
    """Draw a float32 tensor whose rows and columns have sizes of their own, up to 2^exponent.

    Half of the values have 5 significant bits: they often lie midway between two in fp8.
    """
    values = rng.standard_normal((rows, columns))
    mantissas, exponents = np.frexp(values[:, ::2])
    values[:, ::2] = np.ldexp(np.round(mantissas * 2**5), exponents - 5)
    down = rng.integers(0, DEPTH // 2 + 1, rows)[:, None] + rng.integers(0, DEPTH // 2, columns)
    return torch.from_numpy(np.ldexp(values, exponent - down)).float()


def draw_case(
    seed: int, dtype: torch.dtype, sixteens: Sequence[int], exponents: Sequence[int]
) -> Case:
    """Draw the operands: widths M, K and those of the matrices in units of 16, and 3 exponents."""
    rng = np.random.default_rng(seed)
    m, k, *parts = (16 * n for n in sixteens)
    of_x, of_weights, of_d_out = exponents
    # One of the joined matrices is smaller than the others.
    weights = [tensor(rng, n, k, of_weights - 4 * number) for number, n in enumerate(parts)]
    rng.shuffle(weights)  # type: ignore[arg-type]
    x, d_out = tensor(rng, m, k, of_x), tensor(rng, m, sum(parts), of_d_out)
    return Case(x.to(dtype), [w.to(dtype) for w in weights], d_out.to(dtype))


exponent = st.integers(-30, 30)


@composite
def cases(draw: Draw) -> Any:
    """Draw the fields of a Case: any exponents, bfloat16 or float32, one to three matrices."""
    sixteens = draw(st.lists(st.integers(1, 5), min_size=3, max_size=5), label="widths / 16")
    exponents = [draw(exponent, label=f"exponent of {name}") for name in ("x", "W", "d_out")]
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]), label="dtype")
    seed = draw(seeds, label="seed")
    case = draw_case(seed, dtype, sixteens, exponents)
    return labelled((case.x, case.weights, case.d_out), draw.numbers)


def computed(case: Case, device: str = "cpu") -> list[Tensor]:
    """Return the product in fp8 and the gradients of x and each matrix, on the CPU."""
    x, *weights = (a.to(device).detach().requires_grad_() for a in (case.x, *case.weights))
    out = Float8Product.apply(x, *weights)
    grads = torch.autograd.grad(out, [x, *weights], case.d_out.to(device))
    for found, like in zip(grads, (x, *weights), strict=True):
        assert found.dtype == like.dtype
        assert found.shape == like.shape
    assert out.dtype == x.dtype
    return [a.detach().cpu() for a in (out, *grads)]


def share(case: Case, found: Sequence[Tensor], device: str = "cpu") -> float:
    """Return the largest error of any number as a share of its bound: up to 1 is right.

    Products of two fp8 numbers are exact in float32. A float32 sum of n terms errs by n roundings
    of the sum of their absolute values. A GPU cuts 32 terms and the sum so far to 13 bits below the
    largest of them, so that each may lose 2^-13 of that. The result is rounded once, to the
    tensor's precision.
    """
    x, d_out, *weights = (a.double().numpy() for a in (case.x, case.d_out, *case.weights))
    d_x, d_weights = product_vjp(x, weights, d_out)
    wanted = [product(x, weights), d_x, *d_weights]
    terms = [x.shape[1], d_out.shape[1], *[x.shape[0]] * len(weights)]
    unit = torch.finfo(case.x.dtype).eps / 2
    worst = 0.0
    given = zip(found, wanted, sizes(x, weights, d_out), terms, strict=True)
    for got, want, size, n in given:
        summed = n * 2.0**-24 if device == "cpu" else (n + math.ceil(n / 32)) * 2.0**-13
        bound = summed * size + unit * (abs(want) + summed * size)
        error = abs(got.double().numpy() - want)
        shares = np.where(error > 0, error / np.maximum(bound, 2.0**-126 * unit), 0)
        worst = max(worst, float(np.nan_to_num(shares, nan=math.inf, posinf=math.inf).max()))
    return worst


def sizes(x: Array, weights: Sequence[Array], d_out: Array) -> list[Array]:
    """Return the sums of the absolute values of the terms, of each result."""

    def absolute(a: Array, form: Format) -> Array:
        values, scale = quantize(a, form)
        return abs(values) * scale

    of_x, of_d_out = absolute(x, E4M3), absolute(d_out, E5M2)
    of_weights = absolute(np.concatenate(weights), E4M3)
    ends = np.cumsum([len(weight) for weight in weights])[:-1]
    return [of_x @ of_weights.T, of_d_out @ of_weights, *np.split(of_d_out.T @ of_x, ends)]
