"""Linear layer with an int8 weight and one float32 scale for each row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """Linear layer ``x @ (weight * scale[:, None]).T``: weight int8 [out, in], scale float32 [out].

    ``matrix`` [out, in] is quantized symmetrically, row by row.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        wide = matrix.detach().double()
        # The largest absolute value of a row becomes 127; a row of zeros stays zero.
        scale = (wide.abs().amax(1) / 127).float()
        steps = wide / scale.double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("weight", steps.round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] of weight times scale, rounded once to ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.weight.to(wide) * self.scale.to(wide)[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of ``x``."""
        if x.dtype == torch.float16:  # sums of products not yet scaled may exceed 65,504
            return F.linear(x, self.dequantize(x.dtype))
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
