"""The error bounds of the tests and of compare.py, with their reasoning.

Three tiers, from sharp to wide:

1. ``FLOAT64_TOLERANCE``: both in float64. Rounding is some 1e-15: 1e-10 hides no wrong eps or mask.
2. ``dot_bound``, ``attention_bound``: one operation in its precision u, against its float64 result.
3. ``composed_bound``: many operations in low precision, against the error of a baseline, the
   oracle itself in the same precision, which is independent of what is tested.

Errors are computed in float64; a NaN or an infinity is an infinite error. Axes: B batch, T query
position, S key position, H query heads, N key/value heads, R query heads of one of them,
K head_dim, V vocabulary.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from . import ops
from .ops import Array

# Half the gap between 1 and the next number, u: the largest relative error of one rounding.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}

# Tier 1: bounds the largest error over the largest value of the tensor.
FLOAT64_TOLERANCE = 1e-10

# Tier 2: multiplies sqrt(n) u. The probabilistic bound of Ipsen and Zhou (arXiv 1906.10465)
# fails with probability 2 exp(-lambda^2 / 2): at 6, once in 3e7 elements.
LAMBDA = 6.0

# Tier 2, in attention. The error of one exponential, in roundings: torch's CPU kernels ask for at
# most 20 units in the last place, 40 roundings, which are counted as LAMBDA standard deviations.
EXP_ROUNDINGS = 40.0 / LAMBDA
# Roundings of a weight besides its exponential's: the exponential stored, the division, the
# weight stored, and one by which online softmax scales again what it has summed.
WEIGHT_ROUNDINGS = 4.0
# Roundings of each score of its own: scaled, turned to base 2, its key scaled before the product.
SCORE_ROUNDINGS = 3.0
# Constants that scale every score alike, each rounded: log2(e), and two square roots of the scale.
SCORE_CONSTANTS = 3.0

MAX_SCORES = 2**24  # attention scores per chunk of attention_bound: some GiB

# Tier 3: an implementation's error may be this many times the baseline's ...
BASELINE_FACTOR = 3.0
# ... plus this many roundings of the value itself, for baselines that are exact, or right by
# chance. An average over many elements is rarely right by chance; the largest error, a single
# draw, can be, where one element is much larger than the others (a product of gate and up).
FLOOR_ROUNDINGS = 8.0
FLOOR_ROUNDINGS_WORST = 24.0
# A loop that adds n products one after the other errs by this many sqrt(n) roundings of the sum,
# root mean square: its partial sums grow with sqrt(k), and a number is rounded by 0.42 u on
# average. BLAS sums blocks separately, so that the baseline's error is several times less.
SEQUENTIAL_SUM_ROUNDINGS = 0.3


def max_relative_error(actual: Array, expected: Array) -> float:
    """Return ``max |actual - expected| / max |expected|`` (tier 1); inf for another shape."""
    difference = _difference(actual, expected)
    if difference is None:
        return math.inf
    scale = float(np.abs(expected).max(initial=0.0))
    worst = float(np.abs(difference).max(initial=0.0))
    return worst / scale if scale > 0 else (0.0 if worst == 0 else math.inf)


def dot_bound(abs_dot: Array, exact: Array, n: int, unit: float) -> Array:
    """Bound the error of every dot product y = x^T w of length ``n`` (tier 2).

    ``|y - y64| <= lambda sqrt(n) u |x|^T |w| + u |y|``; ``abs_dot`` is |x|^T |w|, ``unit`` u. Not
    scaled by |y| alone: after cancellation y may be tiny while its error is not. The oracle's own
    tests (oracle/test_ops_in_torch.py) alone use it.
    """
    bound: Array = LAMBDA * math.sqrt(n) * unit * abs_dot + unit * np.abs(exact)
    return bound


def attention_bound(
    q_BTHK: Array, k_BNSK: Array, v_BNSK: Array, mask_BTS: Array, dtype: str
) -> Array:
    """Bound the error of every element of attention's output [B, T, H, K] in ``dtype`` (tier 2).

    The arguments are float64, q and k rotated: q [B, T, H, K], k and v [B, N, S, K], mask
    [B, T, S].

    An error e_j of score j multiplies its weight p_j by 1 + e_j, and as the weights are divided
    by their sum, the output o = sum p_j v_j moves by ``sum p_j e_j (v_j - o)``: an error common
    to all keys cancels. A score errs in proportion to ``|q|^T |k_j| / sqrt(K)``, not to itself.
    Errors independent between keys (of a dot product, of an exponential) add up as
    ``lambda sqrt(sum p_j^2 e_j^2 (v_j - o)^2)``. Correlated ones (the query scaled before the
    product, a constant rounded) are bounded by the Cauchy-Schwarz inequality:
    ``sqrt(sum p_j e_j^2) sqrt(sum p_j (v_j - o)^2)``. The sum over keys may be in any order.
    """
    group = partial(ops.group_queries, n_kv_heads=k_BNSK.shape[1])
    bound: Array = np.empty(q_BTHK.shape, q_BTHK.dtype)
    rows = max(1, MAX_SCORES // (mask_BTS.size // mask_BTS.shape[1] * q_BTHK.shape[2]))
    for start in range(0, q_BTHK.shape[1], rows):  # a long prompt's scores are large arrays
        chunk = slice(start, start + rows)
        part = _mix_bound(group(q_BTHK[:, chunk]), k_BNSK, v_BNSK, mask_BTS[:, chunk], dtype)
        bound[:, chunk] = ops.ungroup_queries(part)
    return bound


def _mix_bound(q_BNRTK: Array, k_BNSK: Array, v_BNSK: Array, mask_BTS: Array, dtype: str) -> Array:
    """Return attention_bound of a chunk of queries, both [B, N, R, T, K]."""
    unit = UNIT_ROUNDOFF[dtype]
    sum_unit = min(unit, UNIT_ROUNDOFF["float32"])  # products are summed in float32 at least
    mix, v_squared = ops.attention_mix, v_BNSK * v_BNSK
    scores = ops.attention_scores(q_BNRTK, k_BNSK)
    p = ops.masked_softmax(scores, mask_BTS)
    out = mix(p, v_BNSK)
    sizes = ops.attention_scores(np.abs(q_BNRTK), np.abs(k_BNSK))
    # The row's maximum less each score: the exponential's argument, negated, which is rounded.
    below = -np.log(p / p.max(axis=-1, keepdims=True), out=np.zeros_like(p), where=p > 0)
    roundings = SCORE_ROUNDINGS * sizes + below + WEIGHT_ROUNDINGS + EXP_ROUNDINGS * sum_unit / unit
    # p_j^2 e_j^2 of the errors independent between keys, then the sum of it times (v_j - o)^2.
    own = p**2 * (q_BNRTK.shape[-1] * (sum_unit * sizes) ** 2 + (unit * roundings) ** 2)
    own_spread = mix(own, v_squared) - 2 * out * mix(own, v_BNSK) + out**2 * _total(own)
    scores_spread = _total(p * scores**2) - _total(p * scores) ** 2
    shared = _root(_total(p * sizes**2)) + SCORE_CONSTANTS * _root(scores_spread)
    spread = _root(mix(p, v_squared) - out**2)
    # In any order a partial sum is hardly larger than the sum plus a random walk of the terms.
    partial_sums = 2 * np.abs(out) + _root(mix(p**2, v_squared))
    order = np.sqrt(np.sum(p > 0, axis=-1, keepdims=True)) * sum_unit * partial_sums
    independent = LAMBDA * (_root(own_spread) + order)
    bound: Array = independent + unit * (shared * spread + WEIGHT_ROUNDINGS * np.abs(out))
    return bound


def _total(x: Array) -> Array:
    total: Array = np.sum(x, axis=-1, keepdims=True)
    return total


def _root(x: Array) -> Array:
    """Return ``sqrt(max(x, 0))``, for an x that cancellation may have made less than zero."""
    root: Array = np.sqrt(np.maximum(x, 0.0))
    return root


class Errors(NamedTuple):
    """Errors of one tensor against its exact values, each relative to the tensor's size."""

    rms: float  # root mean square of the error over that of the values
    worst: float  # largest error over largest value
    token: float  # the largest rms of a single token: an average hides one wrong token in 4096

    def within(self, bound: "Errors") -> bool:
        """Return whether every error is finite and at most its bound.

        An infinite error is within no bound: a NaN in the baseline must not excuse another.
        """
        return all(e <= limit and e < math.inf for e, limit in zip(self, bound, strict=True))

    def share(self, bound: "Errors") -> float:
        """Return the largest of ``error / bound``; infinite where an error is."""
        return max(self.shares(bound))

    def shares(self, bound: "Errors") -> list[float]:
        """Return ``error / bound`` of each error; infinite where the error is."""
        pairs = zip(self, bound, strict=True)
        return [_ratio(error, limit) if error < math.inf else error for error, limit in pairs]


def errors(actual: Array, exact: Array) -> Errors:
    """Return the errors of ``actual`` against ``exact`` [B, T, ...]; inf for another shape."""
    difference = _difference(actual, exact)
    if difference is None:
        return Errors(math.inf, math.inf, math.inf)
    exact = exact.astype(np.float64, copy=False)
    size2, error2 = _mean_square(exact), _mean_square(difference)
    whole = math.sqrt(float(size2.mean()))
    # A far smaller token (padding's attention output, zero) errs relative to the tensor's rounding.
    size = np.maximum(np.sqrt(size2), whole * UNIT_ROUNDOFF["float32"])
    return Errors(
        rms=_ratio(math.sqrt(float(error2.mean())), whole),
        worst=_ratio(float(np.abs(difference).max()), float(np.abs(exact).max())),
        token=float(_ratios(np.sqrt(error2), size).max()),
    )


def _mean_square(x: Array) -> Array:
    """Return the mean square of every token: [B, T, ...] -> [B, T]."""
    x = x.reshape(x.shape + (1,) * (3 - x.ndim))  # of fewer axes every element is a token
    rows = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    mean: Array = np.einsum("bti,bti->bt", rows, rows) / rows.shape[-1]
    return mean


def errors_and_bounds(actual: Array, exact: Array, bounds: Array) -> tuple[Errors, Errors]:
    """Return the errors of ``actual`` against ``exact``, and their bounds; all [B, T, ...].

    ``bounds`` has one bound for each element. The worst element and token are those of the
    largest ``error / bound``: one with a wide bound excuses no other. A bound that is not finite
    excuses no error.
    """
    difference = _difference(actual, exact)
    if difference is None or not np.isfinite(bounds).all():
        return errors(actual, exact), Errors(0, 0, 0)
    over_token = tuple(range(2, exact.ndim))

    def by_token(x: Array) -> Array:
        mean: Array = np.sqrt(np.mean(x**2, axis=over_token))
        return mean

    difference, size = np.abs(difference), by_token(exact)
    whole = math.sqrt(float(np.mean(size**2)))
    sizes = np.maximum(size, whole * UNIT_ROUNDOFF["float32"])  # as in errors
    element = np.argmax(_ratios(difference, bounds))
    token = np.argmax(_ratios(by_token(difference), by_token(bounds)))
    error, bound = (
        Errors(
            rms=_ratio(math.sqrt(float(np.mean(x**2))), whole),
            worst=_ratio(float(x.flat[element]), float(np.abs(exact).max())),
            token=_ratio(float(by_token(x).flat[token]), float(sizes.flat[token])),
        )
        for x in (difference, bounds)
    )
    return error, bound


def sequential_sum_error(n_terms: int, dtype: str) -> float:
    """Return the relative error, root mean square, of ``n_terms`` products added in a plain loop.

    ``0.3 sqrt(n) u``; 0 for no terms. u is at most float32's: sums are float32 at least.
    """
    unit = min(UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF["float32"])
    return SEQUENTIAL_SUM_ROUNDINGS * math.sqrt(n_terms) * unit


def composed_bound(baseline_error: Errors, dtype: str) -> Errors:
    """Return ``BASELINE_FACTOR * baseline_error + floor`` for each kind of error (tier 3).

    ``baseline_error`` has the errors of the oracle in the same dtype against the same exact
    values. PyTorch's accuracy check and FlashAttention's tests judge a kernel in this way.
    """
    unit = UNIT_ROUNDOFF[dtype]
    return Errors(
        rms=BASELINE_FACTOR * baseline_error.rms + FLOOR_ROUNDINGS * unit,
        worst=BASELINE_FACTOR * baseline_error.worst + FLOOR_ROUNDINGS_WORST * unit,
        token=BASELINE_FACTOR * baseline_error.token + FLOOR_ROUNDINGS * unit,
    )


def kl_per_token(actual_BTV: Array, exact_BTV: Array) -> Array:
    """Return KL(exact || actual) in nats of every token's logits: [B, T, V] -> [B, T]."""
    p, q = _log_softmax(exact_BTV), _log_softmax(actual_BTV)
    divergence: Array = np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)  # but for rounding
    return divergence


def kl_bound(baseline_kl: float, largest_logit: float, dtype: str) -> float:
    """Bound one token's KL in nats, from the baseline's KL and the largest |logit|.

    KL is quadratic in the logits' error, so BASELINE_FACTOR enters squared. The floor is what the
    roundings allowed to a single logit can make of it: errors d within +-b give KL at most
    (2 b)^2 / 8 (Hoeffding's lemma for log E[exp(d)] - E[d]); and what float64 makes of the
    difference of two logarithms.
    """
    computing = FLOOR_ROUNDINGS_WORST * UNIT_ROUNDOFF["float64"] * (1.0 + largest_logit)
    rounding = FLOOR_ROUNDINGS_WORST * UNIT_ROUNDOFF[dtype] * largest_logit
    return BASELINE_FACTOR**2 * max(baseline_kl, 0.0) + rounding**2 / 2 + computing


def _log_softmax(logits: Array) -> Array:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return result


def _difference(actual: Array, expected: Array) -> Array | None:
    """Return actual - expected in float64; None for another shape or where it is not finite."""
    if actual.shape != expected.shape:
        return None
    with np.errstate(invalid="ignore"):
        difference: Array = actual.astype(np.float64) - expected.astype(np.float64, copy=False)
    # A value that is not finite on either side makes the difference NaN or infinite.
    if not np.isfinite(difference).all():
        return None
    return difference


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def _ratios(error: Array, size: Array) -> Array:
    if (size > 0).all():
        return error / size
    ratios = np.divide(error, size, out=np.zeros_like(error), where=size > 0)
    return np.where((size == 0) & (error > 0), math.inf, ratios)
