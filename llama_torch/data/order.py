"""The order of training windows: pure functions of seed and window number, in O(1) memory."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # Feistel rounds: three for each half
SHARE_BITS = 62  # of a share in fixed point, so that counts are exact for any length of run

Indices = NDArray[np.int64]


def permute(indices: Indices, n: int, keys: NDArray[np.uint64]) -> Indices:
    """Return the images [N] of ``indices`` [N] under a keyed permutation of range(n).

    A Feistel network on pairs (i, j) with i < a, j < b and a * b >= n: each round adds a hash of
    one half to the other, which is invertible. An image of n or more is permuted again until it
    is below n (cycle walking; Black and Rogaway 2002); fewer than one in sqrt(n) is.
    """
    a = math.isqrt(n - 1) + 1
    sizes = np.uint64(a), np.uint64(-(-n // a))
    values = _network(indices.astype(np.uint64), sizes, keys)
    while (outside := values >= n).any():
        values[outside] = _network(values[outside], sizes, keys)
    return values.astype(np.int64)


def _network(
    values: NDArray[np.uint64], sizes: tuple[np.uint64, np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    halves = [values % sizes[0], values // sizes[0]]
    for i, key in enumerate(keys):
        target, source = i % 2, 1 - i % 2
        hashed = _hash(halves[source] ^ key) % sizes[target]
        halves[target] = (halves[target] + hashed) % sizes[target]
    return halves[1] * sizes[0] + halves[0]


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits (Steele et al. 2014, SplitMix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def window_starts(
    n_tokens: int, context: int, seed: int, indices: Indices, source: int = 0
) -> Indices:
    """Return the first token [N] of a source's training windows, by their numbers ``indices`` [N].

    Each epoch visits disjoint windows once, in its own order and from its own offset, so
    that window boundaries move between epochs.
    """
    per_epoch = max(1, (n_tokens - 1) // context - 1)
    slack = n_tokens - 1 - per_epoch * context
    epochs, places = np.divmod(indices, per_epoch)
    starts = np.empty_like(indices)
    for epoch in np.unique(epochs):
        seeds = np.random.SeedSequence([seed, int(epoch), source])
        keys = seeds.generate_state(ROUNDS + 1, np.uint64).astype(np.uint64)
        here = epochs == epoch
        offset = int(keys[ROUNDS]) % (slack + 1)
        starts[here] = offset + permute(places[here], per_epoch, keys[:ROUNDS]) * context
    return starts


def source_of(index: int, weights: tuple[float, ...]) -> tuple[int, int]:
    """Return the source of the ``index``-th window, and how many before it are of that source.

    Of any number of windows from the first on, each source has its share to within a few: the
    sources are halved by weight until one is left, and of n windows that reach a half, whose
    share is p, exactly floor(n p) go on to its first part.
    """
    low, high = 0, len(weights)
    while high - low > 1:
        cut, share = _halve(weights[low:high])
        before = index * share >> SHARE_BITS
        if (index + 1) * share >> SHARE_BITS > before:
            index, high = before, low + cut
        else:
            index, low = index - before, low + cut
    return low, index


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Return each weight over their sum, exactly: 0.1 is a tenth, as it is written."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    return [weight / total for weight in exact]


@lru_cache(maxsize=1024)
def _halve(weights: tuple[float, ...]) -> tuple[int, int]:
    """Cut weights in two parts of most nearly the same sum; return the first one's share too."""
    sums = list(accumulate(shares(weights)))[:-1]
    cut = min(range(len(sums)), key=lambda i: abs(sums[i] - Fraction(1, 2)))
    return cut + 1, math.ceil(sums[cut] * 2**SHARE_BITS)


def counts(n: int, weights: tuple[float, ...]) -> list[int]:
    """Return how many of the first n windows each source has."""
    if len(weights) == 1:
        return [n]
    cut, share = _halve(weights)
    first = n * share >> SHARE_BITS
    return [*counts(first, weights[:cut]), *counts(n - first, weights[cut:])]
