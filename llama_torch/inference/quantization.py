"""Quantization of a model's matrices to int8 or int4: integers times scales.

int8 takes half of bfloat16's bytes and int4 a quarter and a sixteenth of that, and decoding is
bound by reading them. Activations keep their precision, and so do the embedding, the norms and a
head tied to the embedding. Only the weights lose precision:

int8  a row has one float32 scale. bfloat16 represents the integers exactly, and a product is scaled
      after its terms are summed (in float16, whose range is too small for those sums, the matrix is
      scaled and rounded first).
int4  64 columns of a row have one bfloat16 scale; see model/int4_linear.py.
"""

import torch
from torch import Tensor, nn

from ..model.int4_linear import Int4Linear
from ..model.int8_linear import Int8Linear
from ..model.llama import Llama
from ..model.quantized_linear import QuantizedLinear
from .config import Quantize

LAYERS: dict[Quantize, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


@torch.no_grad()
def quantize(model: Llama, kind: Quantize) -> Llama:
    """Replace every nn.Linear of a model by a layer of ``kind``, in place; return the model."""
    if kind == "none":
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LAYERS[kind](child.weight))
    return model


def dequantize(model: Llama) -> dict[str, Tensor]:
    """Return the weights that a quantized model represents, in float64, by checkpoint name."""
    found = {name: value.detach().double() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{name}.weight"] = module.dequantize(torch.float64)
    return found
