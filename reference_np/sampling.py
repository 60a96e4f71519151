"""The probabilities from which a sampler draws the next token, for one row of logits [V].

Computed in float64 whatever the dtype of the logits. Of equal logits the lower id comes first.
"""

import numpy as np

from .ops import Array


def penalize(logits_V: Array, context_ids: Array, penalty: float) -> Array:
    """Return the logits [V] after the repetition penalty (Keskar et al. 2019, section 4.1).

    For every token in ``context_ids`` (prompt and completion so far, in any number and order)
    ``l / penalty`` where l > 0, else ``l * penalty``, so that a negative logit falls too.
    """
    logits = np.array(logits_V, np.float64)
    for token in {int(token) for token in context_ids}:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def token_probabilities(
    logits_V: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """Return the token probabilities [V] after temperature, top-k, top-p and min-p, in that order.

    ``softmax(l / temperature)``; the tokens that a filter removes have probability 0, and the
    others are divided by their sum.

    temperature  divides the logits; 0 keeps the most likely token alone.
    top_k        keeps this many of the most likely tokens (0: all).
    top_p        keeps the fewest of the most likely tokens whose probabilities sum to at least
                 this (Holtzman et al. 2020).
    min_p        keeps the tokens of at least this fraction of the highest probability (Nguyen et
                 al. 2024).
    """
    logits = np.array(logits_V, np.float64)
    order = np.argsort(-logits, kind="stable")  # most likely first
    if temperature == 0:
        order, temperature = order[:1], 1.0
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    weights /= weights.sum()
    cumulative = 0.0
    kept: list[int] = []
    for token, weight in zip(order, weights, strict=True):
        if cumulative >= top_p and top_p < 1:
            break
        if weight >= min_p * weights[0]:
            kept.append(int(token))
        cumulative += float(weight)
    probabilities = np.zeros_like(logits)
    probabilities[kept] = weights[: len(kept)]
    normalized: Array = probabilities / probabilities.sum()
    return normalized
