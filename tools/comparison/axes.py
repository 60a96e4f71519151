"""Tensors that were written from a transposed array: right numbers in another order.

Some writers (safetensors 0.8.0's for NumPy) store an array's memory as it lies, under the shape
of the view. What is read back is then a permutation of what was computed.
"""

from itertools import permutations

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import errors

Order = tuple[int, ...]
# Relative rms of the error of what is alike, bfloat16's roundings included; and how many times
# further off it must be as it is stored (tokens that are themselves alike may change places).
ALIKE, TIMES = 0.02, 5


def as_declared(stored: Array, order: Order) -> Array:
    """Return an array [shape] whose memory was written with its axes in ``order``."""
    lying = stored.reshape([stored.shape[axis] for axis in order])
    return np.ascontiguousarray(lying.transpose(np.argsort(order)))


def find_order(stored: Array, exact: Array) -> Order | None:
    """Return the order of axes in which ``stored`` holds the numbers of ``exact``, if another.

    None where they are alike as they are, or in no order.
    """
    found = errors(stored, exact).rms
    if found < ALIKE:
        return None
    for order in permutations(range(exact.ndim)):
        error = errors(as_declared(stored, order), exact).rms
        if error < ALIKE and error * TIMES < found:
            return order
    return None
