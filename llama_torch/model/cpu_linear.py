"""Matrix products of inference on a CPU by oneDNN, in float32.

torch takes MKL for them, which does not use all of the vectors of some processors: on an AMD EPYC
with AVX-512 oneDNN multiplied a prompt's matrices twice as fast. Which of the two is quicker is
measured: inference/cpu_choice.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from .llama import Attention, Block, FeedForward, Llama, linear_products

Products = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


def onednn_products(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Return each layer's product with x: [..., in] to [..., out].

    With gradients, and of layers that are not plain, float32 and on a CPU, by the layers
    themselves.
    """
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu":
        return linear_products(x, layers)
    multiply = torch.ops.mkldnn._linear_pointwise
    return [
        multiply(x, layer.weight, None, "none", [], "") if type(layer) is nn.Linear else layer(x)
        for layer in layers
    ]


def parts_with_products(model: Llama) -> list[Attention | FeedForward]:
    """Return the modules that compute a model's matrix products, but for the head."""
    blocks = [cast(Block, layer) for layer in model.model.layers]
    return [part for block in blocks for part in (block.self_attn, block.mlp)]


@contextmanager
def with_products(model: Llama, products: Products) -> Iterator[None]:
    """Have a model's blocks compute their matrix products by a function."""
    parts = parts_with_products(model)
    before = [part.products for part in parts]
    # Not by setattr, which looks for parameters each time: this is run for each token.
    for part in parts:
        vars(part)["products"] = products
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            vars(part)["products"] = own
