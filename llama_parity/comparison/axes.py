"""Recognise tensors that were written from a transposed array: right numbers in another order.

Some writers (safetensors 0.8.0's for NumPy) store the memory of an array in its own order, under
the shape of the transposed view. The tensor that is read is then a permutation of the computed one.
"""

from itertools import permutations

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import errors

Order = tuple[int, ...]  # a tensor's axes, in the order in which its memory holds them
# Largest relative rms of the error in the right order, bfloat16's roundings included; and how many
# times larger it must be as stored (tokens that are themselves alike may change places).
MAX_ERROR, TIMES = 0.02, 5


def as_declared(stored: Array, order: Order) -> Array:
    """Return a tensor, of the shape of ``stored``, whose memory holds its axes in ``order``."""
    in_memory = stored.reshape([stored.shape[axis] for axis in order])
    return np.ascontiguousarray(in_memory.transpose(np.argsort(order)))


def find_order(stored: Array, exact: Array) -> Order | None:
    """Return the other order of axes in which ``stored`` holds the numbers of ``exact``.

    None where they agree as stored, or in no order.
    """
    as_stored = errors(stored, exact).rms
    if as_stored < MAX_ERROR:
        return None
    for order in permutations(range(exact.ndim)):
        error = errors(as_declared(stored, order), exact).rms
        if error < MAX_ERROR and error * TIMES < as_stored:
            return order
    return None
