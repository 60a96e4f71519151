"""A linear layer whose matrix is held as int8 with one float32 scale a row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """Linear layer ``x @ (weight * scale).T``: weight int8 [out, in], scale float32 [out]."""

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

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] that int8 and scale represent, rounded once to ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.weight.to(wide) * self.scale.to(wide)[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in x's precision."""
        if x.dtype == torch.float16:  # sums without their scale could leave its range
            return F.linear(x, self.dequantize(x.dtype))
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
