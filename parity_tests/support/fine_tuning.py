"""Conversations, padding and derivatives for the tests of the fine-tuning oracle."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from reference_np.ops import Array

# Of the largest value, as every float64 tolerance of the suite.
TOLERANCE = 1e-10
# Fourth-order differences with step h err by h^4 f^(5) / 30 and by some u |f| / h: at 1e-3 some
# 1e-13 each for f and its derivatives of size one, and 1e-9 leaves room for larger ones.
STEP, DIFFERENCES = 1e-3, 1e-9
VOCAB = 7

segments = st.lists(
    st.tuples(st.lists(st.integers(0, VOCAB - 1), max_size=4), st.booleans()),
    min_size=1,
    max_size=5,
)
# Conversations as segments (token ids, learnt); none is empty.
conversations = st.lists(
    segments.filter(lambda own: any(ids for ids, _ in own)), min_size=1, max_size=4
)


def agree(found: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    """Return whether two arrays differ by no more than a share of their largest value."""
    return distance(found, expected) <= tolerance


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference as a share of the largest expected value (of 1 at least).

    It is infinite where the shapes differ and where one has a NaN.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return np.inf
    largest = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    return float(np.max(np.abs(found - expected), initial=0.0)) / largest


def gradient_error(f: Callable[[Array], float], x: Array, gradient: Array) -> float:
    """Return how far a gradient's slope along a fixed direction is from f's differences.

    As a share of the slope's terms' absolute values, of 1 at least.
    """
    direction = step_direction(x)
    near, far = (f(x + s * direction) - f(x - s * direction) for s in (STEP, 2 * STEP))
    numeric = (8 * near - far) / (12 * STEP)
    terms = gradient * direction
    return abs(float(np.sum(terms)) - numeric) / max(1.0, float(np.sum(np.abs(terms))))


def step_direction(x: Array) -> Array:
    """Return the direction of ``gradient_error``, of x's shape."""
    return np.random.default_rng(5).standard_normal(x.shape)


def pad_rows(rows: Sequence[Array], filler: Any, left: bool, extra: int = 0) -> Array:
    """Return rows [S, ...] of any lengths as one array [B, T, ...], filled on one side.

    T is the longest row's length and ``extra``.
    """
    longest = max(map(len, rows)) + extra
    shape = len(rows), longest, *rows[0].shape[1:]
    out = np.full(shape, filler, dtype=np.result_type(rows[0], np.min_scalar_type(filler)))
    for target, row in zip(out, rows, strict=True):
        start = longest - len(row) if left else 0
        target[start : start + len(row)] = row
    return out
