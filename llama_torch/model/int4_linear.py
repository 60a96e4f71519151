"""Linear layer with a weight of four-bit integers, and one scale for each group of columns.

A weight is ``scale * n``, n an integer from -8 to 7. A group's largest absolute value becomes at
most 7.5, so that rounding to the nearest is never off by more than half a scale, and zeros stay
zeros. A scale has five significant bits, rounded up: its product with n, which has three, is a
bfloat16 number, so that no precision rounds a dequantized weight again (float16 where it is in
that range).

Blocks of 128 columns are stored in 64 bytes: byte b has n + 8 of column b in its low four bits and
of column b + 64 in its high four. The last block is filled with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64  # columns of one scale
BLOCK = 128  # columns that are stored together
SIGNIFICANT = 5  # bits of a scale
# Within these, products with -8 .. 7 are neither subnormal nor infinite in bfloat16.
MIN_SCALE, MAX_SCALE = 2.0**-118, 2.0**124
CHUNK = 1 << 24  # numbers that are quantized at a time, in float64


class Int4Linear(nn.Module):
    """Linear layer of ``in_features`` inputs with a four-bit weight.

    weight  uint8 [out, 64 blocks], two numbers a byte
    scale   bfloat16 [out, 2 blocks], positive, or 0 in a group of zeros
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor) -> None:
        """Quantize ``matrix`` [out, in], group by group."""
        super().__init__()
        self.in_features = matrix.shape[1]
        rows = max(1, CHUNK // self.in_features)
        parts = [_quantized(part) for part in matrix.detach().split(rows)]
        weight, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] of scale times number in ``dtype``."""
        out, wide = len(self.weight), torch.float64 if dtype == torch.float64 else torch.float32
        packed = self.weight.view(out, -1, 1, BLOCK // 2)
        numbers = torch.cat([packed & 15, packed >> 4], 2).view(out, -1, GROUP).to(wide) - 8
        matrix = (numbers * self.scale.to(wide)[..., None]).view(out, -1)
        return matrix[:, : self.in_features].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of ``x``."""
        return F.linear(x, self.dequantize(x.dtype))


def _quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and the scales, see Int4Linear, of some rows [rows, in]."""
    rows, n_in = matrix.shape
    wide = F.pad(matrix.double(), (0, -n_in % BLOCK)).view(rows, -1, GROUP)
    top = wide.abs().amax(2)
    scale = _scale(top)
    steps = wide / torch.where(scale > 0, scale, 1.0)[..., None]
    numbers = (steps.round().clamp(-8, 7) + 8).to(torch.uint8).view(rows, -1, 2, BLOCK // 2)
    packed = numbers[:, :, 0] | (numbers[:, :, 1] << 4)
    return packed.view(rows, -1), scale.to(torch.bfloat16)


def _scale(top: Tensor) -> Tensor:
    """Return the scales of groups whose largest absolute values are ``top``, float64."""
    fraction, exponent = torch.frexp(top / 7.5)
    bits = (fraction * 2.0**SIGNIFICANT).ceil()
    scale = torch.ldexp(bits, exponent - SIGNIFICANT).clamp(MIN_SCALE, MAX_SCALE)
    scale = torch.where(top > 0, scale, 0.0)
    return torch.where(top.isfinite(), scale, torch.nan)
