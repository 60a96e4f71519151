"""What Triton's interpreter, which has no inline assembly, runs in its place."""

import triton
import triton.language as tl


@triton.jit
def numbers(words, sums: tl.constexpr):
    """Turn words of four int8 weights into four numbers, as kernels._numbers does."""
    a, b = (words << 24 >> 24).to(sums), (words << 16 >> 24).to(sums)
    return a, b, (words << 8 >> 24).to(sums), (words >> 24).to(sums)
