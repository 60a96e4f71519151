"""A substitute of the kernels' inline assembly for Triton's interpreter, which has none."""

import triton
import triton.language as tl


@triton.jit
def numbers(words, sums: tl.constexpr):
    """Return the four int8 weights of each 32-bit word in dtype ``sums``, as gemv._numbers does."""
    a, b = (words << 24 >> 24).to(sums), (words << 16 >> 24).to(sums)
    return a, b, (words << 8 >> 24).to(sums), (words >> 24).to(sums)
