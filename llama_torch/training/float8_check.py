"""Compare the products in fp8 of a model in training with the NumPy oracle's."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference_np.float8 import product, product_vjp
from reference_np.ops import Array
from reference_np.tolerances import FLOOR_ROUNDINGS

from ..model.float8_linear import float8_products
from ..model.llama import Llama
from .compile import uncompiled
from .error_bounds import BoundedError

TOKENS = 32
# Of a sum in a GPU's fp8 products, 13 bits are kept at every 32 terms; elsewhere it is float32's.
ON_GPU, ON_CPU = 2.0**-13 / 32, 2.0**-24


def float8_errors(model: Llama, tokens_BT: Tensor) -> list[BoundedError]:
    """Return errors and bounds of the fp8 products, and of their gradients, of two blocks.

    The inputs of the first and the last block are those of a row's first tokens; the outputs stand
    for their gradients. Nothing of the model is changed.
    """
    return [
        error
        for x, layers in _inputs(model, tokens_BT[:1, :TOKENS])
        for error in _compare(x, layers)
    ]


def _inputs(model: Llama, tokens_BT: Tensor) -> Iterator[tuple[Tensor, Sequence[nn.Linear]]]:
    """Yield the inputs [B, T, in] of two blocks' products, each with its layers."""
    seen: dict[str, Tensor] = {}
    device = model.head_weight.device
    with torch.no_grad(), uncompiled():
        model.model(tokens_BT.to(device), trace=seen.__setitem__)
    blocks: list[Any] = list(model.model.layers)
    for number in sorted({0, len(blocks) - 1}):
        block = blocks[number]
        attention, mlp = block.self_attn, block.mlp
        before = f"layers.{number}."
        yield seen[before + "attn_norm"], (attention.q_proj, attention.k_proj, attention.v_proj)
        yield seen[before + "attn"].flatten(2), (attention.o_proj,)
        yield seen[before + "ffn_norm"], (mlp.gate_proj, mlp.up_proj)
        yield seen[before + "ffn"], (mlp.down_proj,)


def _compare(x: Tensor, layers: Sequence[nn.Linear]) -> Iterator[BoundedError]:
    """Yield the errors of one product and its gradients, relative in root mean square."""
    x = x.detach().requires_grad_()
    weights = [layer.weight for layer in layers]
    with torch.enable_grad():
        out = torch.cat([*float8_products(x, layers)], -1)
    grads = torch.autograd.grad(out, [x, *weights], out.detach())
    d_out, given, *matrices = (a.detach().cpu().double().numpy() for a in (out, x, *weights))
    wanted = _all_products(given, matrices, d_out)
    # Where terms cancel, their roundings are those of the sum of absolute values.
    sizes = _all_products(abs(given), [abs(matrix) for matrix in matrices], abs(d_out))
    terms = given.shape[-1], d_out.shape[-1], *[given.shape[0] * given.shape[1]] * len(matrices)
    unit, per_term = torch.finfo(out.dtype).eps / 2, ON_GPU if x.is_cuda else ON_CPU
    found = (out.detach(), *grads)
    for got, want, size, n in zip(found, wanted, sizes, terms, strict=True):
        scale = np.linalg.norm(want) or 1.0
        error = np.linalg.norm(got.cpu().double().numpy() - want) / scale
        bound = FLOOR_ROUNDINGS * unit + n * per_term * np.linalg.norm(size) / scale
        yield BoundedError("fp8_products", float(error), float(bound))


def _all_products(x: Array, matrices: Sequence[Array], d_out: Array) -> list[Array]:
    """Return the oracle's product, and its gradients of x and of each matrix."""
    d_x, d_matrices = product_vjp(x, matrices, d_out)
    return [product(x, matrices), d_x, *d_matrices]
