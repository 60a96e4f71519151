"""Numbers of which a mask says what counts: the last real one, moments, whitening.

What stands where the mask is False changes nothing, NaN and infinities included: it is replaced
before anything is computed, as 0 * NaN is NaN. A mask is True for real tokens and may have holes.

Axes: B batch (row), T position.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .config import InputError
from .ops import Array

WHITEN_EPS = 1e-8  # under the root, as in the code released with Ziegler et al. 2019


class Moments(NamedTuple):
    """How many numbers, their mean and the sum of their squared deviations, in float64."""

    n: int
    mean: float
    squares: float


def select(x: Array, mask: Array) -> Array:
    """Return x where the mask is True, else 0; of x's shape and dtype."""
    chosen: Array = np.where(mask, x, 0)
    return chosen


def last_real(mask_BT: Array) -> tuple[Array, Array]:
    """Return the rows [n] that have a real token, and the position [n] of the last one of each."""
    rows = np.flatnonzero(mask_BT.any(axis=1))
    return rows, mask_BT.shape[1] - 1 - np.argmax(mask_BT[rows, ::-1], axis=1)


def moments(values: Array, mask: Array) -> Moments:
    """Return the moments of the values [...] where the mask [...] is True, in float64.

    Deviations are from the first value, then from their mean: those of equal values are exactly 0,
    and nothing cancels, as mean(x^2) - mean(x)^2 does for values far from 0.
    """
    real = values[mask].astype(np.float64)
    if not real.size:
        return Moments(0, 0.0, 0.0)
    offsets = real - real[0]
    shift = float(np.mean(offsets))
    return Moments(real.size, float(real[0]) + shift, float(np.sum((offsets - shift) ** 2)))


def join_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the numbers of all parts, such as processes (Chan et al. 1979).

    Those of one part are its own, and parts of one equal value have it as their mean, exactly.
    """
    filled = [part for part in parts if part.n]
    n, mean, squares = filled[0] if filled else Moments(0, 0.0, 0.0)
    for part in filled[1:]:
        total, difference = n + part.n, part.mean - mean
        squares += part.squares + difference**2 * n * part.n / total
        n, mean = total, mean + difference * part.n / total
    return Moments(n, mean, squares)


def variance(of: Moments, unbiased: bool = False) -> float:
    """Return squares / n, or with ``unbiased`` squares / (n - 1); 0 of no numbers."""
    if unbiased and of.n == 1:
        raise InputError("unbiased: one value has no unbiased variance; leave the option out")
    return of.squares / (of.n - unbiased) if of.n else 0.0


def whiten(
    values: Array,
    mask: Array,
    *,
    joint: Moments | None = None,
    mean: str = "removed",
    unbiased: bool = False,
) -> Array:
    """Return ``(x - m) / sqrt(v + 1e-8)`` [...] where the mask is True, else 0 (section 3.2.3).

    joint     the moments m and v are of; default: those of the values under the mask. Of a batch
              spread over processes or micro-batches, ``join_moments`` of all of them.
    mean      "removed", or "kept": m is added again at the end, as Ziegler et al. 2019 whiten
              rewards. (Dividing x without subtracting m would be a third thing.)
    unbiased  divide by n - 1, as TRL does; the default n is that of Ziegler et al. 2019.

    The paper says WHITEN and no more. Equal values become exactly 0 (with "kept", stay).
    """
    if mean not in ("removed", "kept"):
        raise InputError(f"mean: {mean!r}; choose 'removed' or 'kept'")
    of = moments(values, mask) if joint is None else joint
    scale = 1.0 / math.sqrt(variance(of, unbiased) + WHITEN_EPS)
    # In float64: in float32 the mean itself would be rounded.
    whitened = (select(values, mask).astype(np.float64) - of.mean) * scale
    whitened = whitened + of.mean if mean == "kept" else whitened
    return select(whitened, mask).astype(values.dtype)
