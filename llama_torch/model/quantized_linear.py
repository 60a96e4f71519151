"""The linear layers of quantized models."""

from .int4_linear import Int4Linear
from .int8_linear import Int8Linear

QuantizedLinear = Int8Linear | Int4Linear
