"""The measure of an error, for the generator and the check of a port's traces."""

import math
from collections.abc import Sequence

import numpy as np

from reference_np.ops import Array

Ranges = list[list[int]]  # of each row, the first real token and the one after the last


def real_tokens(real: Sequence[Ranges | None], name: str, value: Array) -> Array:
    """Return the elements of a result or an input that count: padding's do not.

    ``real``: of each call its rows' ranges, None where every token is real. ``name``: as in the
    trace, ``call.0.logits``. ``value``: [B, T, ...]; of ranges the rows' tokens one after the
    other, else the value as it is.
    """
    kind, index, _ = name.split(".", 2)
    ranges = real[int(index)] if kind == "call" else None
    if ranges is None:
        return value
    rows = [row[first:end] for row, (first, end) in zip(value, ranges, strict=True)]
    return np.concatenate(rows)


def relative_error(actual: Array, expected: Array) -> float:
    """Return ``max |actual - expected| / max |expected|``; inf where a value is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected)
    if not np.isfinite(difference).all():
        return math.inf
    largest, scale = float(difference.max()), float(np.abs(expected).max())
    return largest / scale if scale > 0 else (0.0 if largest == 0 else math.inf)
