"""int8 quantization of a model's matrices: each row as int8 integers times a float32 scale.

int8 takes half of bfloat16's bytes, and decoding is bound by reading them. Activations keep their
precision, and so do the embedding, the norms and a head tied to the embedding. Only the weights
lose precision: bfloat16 represents the integers exactly, and a product is scaled after its
terms are summed (in float16, whose range is too small for those sums, the matrix is scaled and
rounded first).
"""

import torch
from torch import Tensor, nn

from ..model.int8_linear import Int8Linear
from ..model.llama import Llama


@torch.no_grad()
def quantize(model: Llama) -> Llama:
    """Replace every nn.Linear of a model by an Int8Linear, in place; return the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight))
    return model


def dequantize(model: Llama) -> dict[str, Tensor]:
    """Return the weights that a quantized model represents, in float64, by checkpoint name."""
    found = {name: value.detach().double() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            found[f"{name}.weight"] = module.dequantize(torch.float64)
    return found
