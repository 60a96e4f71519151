"""How the best of K answers grows with K (the paper's figure 7), estimated from N of each prompt.

Every set of K of a prompt's N answers is as probable as another. The mean of a statistic over all
of them is its unbiased estimate, which takes no more than the sorted scores: the m-th smallest of K
is the i-th smallest of N in C(i - 1, m - 1) C(N - i, K - m) of the C(N, K) sets.
"""

from collections.abc import Sequence
from functools import cache
from math import comb
from typing import NamedTuple


class BestOf(NamedTuple):
    """What the best and the middle one of so many answers score, the mean over all prompts."""

    samples: int
    maximum: float
    median: float


def mean_of_rank(ordered: Sequence[float], samples: int, rank: int) -> float:
    """Return the mean of the ``rank``-th smallest of ``samples`` scores over all sets of them.

    ``ordered`` are N scores, ascending; 1 <= rank <= samples <= N.
    """
    weights = _weights(len(ordered), samples, rank)
    return sum(score * weight for score, weight in zip(ordered, weights, strict=True))


@cache
def _weights(n: int, samples: int, rank: int) -> tuple[float, ...]:
    """Return the share of the sets in which each of n scores, ascending, has that rank."""
    total = comb(n, samples)
    places = range(1, n + 1)
    # Whole numbers, of which Python divides ones of any length.
    return tuple(comb(i - 1, rank - 1) * comb(n - i, samples - rank) / total for i in places)


def mean_of_maximum(scores: Sequence[float], samples: int) -> float:
    """Return the mean of the largest of ``samples`` scores over all sets of them."""
    return mean_of_rank(sorted(scores), samples, samples)


def mean_of_median(scores: Sequence[float], samples: int) -> float:
    """Return the mean of the median of ``samples`` scores over all sets of them.

    Of an even number it is halfway between the two in the middle.
    """
    ordered, low, high = sorted(scores), (samples + 1) // 2, samples // 2 + 1
    return (mean_of_rank(ordered, samples, low) + mean_of_rank(ordered, samples, high)) / 2


def best_of(scores: Sequence[Sequence[float]], numbers: Sequence[int] = ()) -> list[BestOf]:
    """Return a row for each of ``numbers`` of answers.

    Unless given they are 1, 2, 4, ..., and as many as every prompt has.
    """
    n = min(map(len, scores))
    rows = []
    for k in numbers or [2**i for i in range(n.bit_length()) if 2**i < n] + [n]:
        sums = (sum(mean(own, k) for own in scores) for mean in (mean_of_maximum, mean_of_median))
        maximum, median = (total / len(scores) for total in sums)
        rows.append(BestOf(k, maximum, median))
    return rows


def table(scores: Sequence[Sequence[float]]) -> list[str]:
    """Return ``best_of`` as lines of text."""
    lines = [f"{'samples':>8}{'max reward':>14}{'median reward':>17}"]
    return lines + [
        f"{row.samples:>8,}{row.maximum:>14.3f}{row.median:>17.3f}" for row in best_of(scores)
    ]
