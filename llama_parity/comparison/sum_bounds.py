"""Bound the errors of sums that a port adds in a plain loop, RMSNorm's mean of squares above all.

An error d of the mean square, relative, makes an error d / 2 of every element of the token. A loop
rounds each term to the spacing of the partial sum that it is added to. Unlike products, squares
are all positive, so that the partial sums grow with k and not with sqrt(k): n alike terms give d
a root mean square of 0.42 u sqrt(n / 3). One outlier channel makes the spacing coarse for all
terms after it: with 0.58 u at most of each, d is up to 0.58 sqrt(n) u, and half of it 0.29 sqrt(n)
u. Both are within ``sequential_sum_error``. But terms less than half the spacing are lost, all to
the same side: with an outlier 1,000 times larger than the others d grows with n, up to n u, and no
factor of sqrt(n) bounds it. So the loop itself is run, forwards and backwards, on the very input.
"""

import numpy as np

from reference_np.config import LlamaConfig
from reference_np.ops import Array
from reference_np.tolerances import (
    BASELINE_FACTOR,
    FLOOR_ROUNDINGS,
    UNIT_ROUNDOFF,
    sequential_sum_error,
)

NORMS = ("attn_norm", "ffn_norm", "norm")


def n_terms(config: LlamaConfig, kind: str) -> int:
    """Return how many terms each element of an activation is a sum of; 0 where it is none.

    Attention's sums have a bound of their own, ``attention_bound``; the norms' one more,
    ``norm_bound``.
    """
    if kind in (*NORMS, "q", "k", "v", "gate", "up", "logits"):
        return config.dim
    widths = {"attn_proj": config.n_heads * config.head_dim, "ffn_proj": config.hidden_dim}
    return widths.get(kind, 0)


def norm_sum_error(x_BTD: Array, eps: float, dtype: str) -> Array:
    """Return what a float32 loop over D may make each token of RMSNorm err by, relative: [B, T, 1].

    The error of the loop over ``x``, forwards or backwards, whichever is larger, but at least
    ``sequential_sum_error``. A loop that overflows counts for nothing.
    """
    n = x_BTD.shape[-1]
    found = [np.full((*x_BTD.shape[:-1], 1), sequential_sum_error(n, dtype))]
    exact = np.mean(x_BTD.astype(np.float64) ** 2, axis=-1, keepdims=True) + eps
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        squares = x_BTD.astype(np.float32) ** 2
        for terms in (squares, squares[..., ::-1]):
            # NumPy's cumulative sum adds one after the other, in float32.
            looped = np.cumsum(terms, axis=-1)[..., -1:].astype(np.float64) / n + eps
            error = np.abs(np.sqrt(exact / looped) - 1)
            found.append(np.where(np.isfinite(looped) & np.isfinite(error), error, 0.0))
    largest: Array = np.maximum.reduce(found)
    return largest


def norm_bound(y_BTD: Array, sum_error_BT1: Array, dtype: str) -> Array:
    """Bound the error of every element of RMSNorm's exact output ``y`` [B, T, D] in ``dtype``.

    As ``composed_bound`` does, with the error of a loop in place of the baseline's. After an
    outlier in the middle come half of the terms, forwards as backwards; vectorised loops and
    trees add fewer to it. Only a loop sorted with the largest term first may err by more.
    """
    relative = BASELINE_FACTOR * sum_error_BT1 + FLOOR_ROUNDINGS * UNIT_ROUNDOFF[dtype]
    bound: Array = relative * np.abs(y_BTD)
    return bound
