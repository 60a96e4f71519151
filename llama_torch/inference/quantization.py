"""int8 weights: each row of a matrix as whole numbers times one scale.

Half of bfloat16's bytes, and decoding is bound by bytes. Activations keep their precision, and so
do the embedding and the norms; a head tied to the embedding stays what it is. What int8 loses is
in the weights alone: bfloat16 holds the whole numbers as they are, and a product is scaled when it
is summed up (in float16, whose range is too small for that, the matrix is scaled and rounded).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.llama import Llama


class Int8Linear(nn.Module):
    """``x @ (weight * scale).T``: weight int8 [out, in], scale float32 [out]."""

    weight: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        wide = matrix.detach().double()
        # The largest of a row becomes 127: symmetric, rounded to nearest. A row of zeros stays.
        scale = (wide.abs().amax(1) / 127).float()
        steps = wide / scale.double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("weight", steps.round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] that this stands for, rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.weight.to(wide) * self.scale.to(wide)[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in x's precision."""
        if x.dtype == torch.float16:  # sums without their scale could leave its range
            return F.linear(x, self.dequantised(x.dtype))
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)


@torch.no_grad()
def quantize(model: Llama) -> Llama:
    """Replace every nn.Linear of a model in place; return the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight))
    return model


def dequantised(model: Llama) -> dict[str, Tensor]:
    """Return float64 parameters, by checkpoint name, of the model that a quantised one computes."""
    found = {name: value.detach().double() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            found[f"{name}.weight"] = module.dequantised(torch.float64)
    return found
