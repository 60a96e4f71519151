"""The measure of an error, for the generator and the check of a port's traces."""

import math

import numpy as np

from reference_np.ops import Array


def relative_error(actual: Array, expected: Array) -> float:
    """Return ``max |actual - expected| / max |expected|``; inf where a value is not finite."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected)
    if not np.isfinite(difference).all():
        return math.inf
    largest, scale = float(difference.max()), float(np.abs(expected).max())
    return largest / scale if scale > 0 else (0.0 if largest == 0 else math.inf)
