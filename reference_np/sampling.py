"""The distribution a sampler draws from: the specification, for one row of logits [V].

Computed in float64 whatever comes in. Ties go to the lower id.
"""

import numpy as np

from .ops import Array


def penalize(logits_V: Array, seen: Array, penalty: float) -> Array:
    """Make the token ids in ``seen`` less likely (Keskar et al. 2019, section 4.1).

    A positive logit is divided by the penalty, a negative one multiplied.
    """
    logits = np.array(logits_V, np.float64)
    for token in {int(token) for token in seen}:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def token_probabilities(
    logits_V: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """Return the distribution [V]: temperature, then top-k, top-p and min-p, in that order.

    temperature  divides the logits; 0 leaves the likeliest token alone.
    top_k        keeps this many of the likeliest (0: all).
    top_p        keeps the fewest likeliest that hold at least this much (Holtzman et al. 2020).
    min_p        keeps those at least this share as likely as the likeliest (Nguyen et al. 2024).
    """
    logits = np.array(logits_V, np.float64)
    order = np.argsort(-logits, kind="stable")  # likeliest first
    if temperature == 0:
        order, temperature = order[:1], 1.0
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    weights /= weights.sum()
    held = 0.0
    kept: list[int] = []
    for token, weight in zip(order, weights, strict=True):
        if held >= top_p and top_p < 1:
            break
        if weight >= min_p * weights[0]:
            kept.append(int(token))
        held += float(weight)
    probabilities = np.zeros_like(logits)
    probabilities[kept] = weights[: len(kept)]
    total: Array = probabilities / probabilities.sum()
    return total
