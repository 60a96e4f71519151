"""Quantize a model's matrices to int8: each row as integers times one scale.

int8 halves bfloat16's bytes, and decoding is bound by bytes. Activations keep their precision, and
so do the embedding, the norms and a head tied to the embedding. Only the weights lose precision:
bfloat16 represents the integers exactly, and a product is scaled after it is summed (in float16,
whose range is too small for such sums, the matrix is scaled and rounded first).
"""

import torch
from torch import Tensor, nn

from ..model.int8_linear import Int8Linear
from ..model.llama import Llama


@torch.no_grad()
def quantize(model: Llama) -> Llama:
    """Replace every nn.Linear of a model in place; return the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight))
    return model


def dequantize(model: Llama) -> dict[str, Tensor]:
    """Return the parameters that a quantised model computes with, float64, by checkpoint name."""
    found = {name: value.detach().double() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            found[f"{name}.weight"] = module.dequantize(torch.float64)
    return found
