"""The reward model's losses, and the reward made of two of them (Llama 2, section 3.2).

Axes: B pairs, or answers; T position.
"""

from collections.abc import Mapping

import numpy as np

from . import ops
from .config import InputError
from .masked import Moments, last_real, whiten
from .ops import IGNORE, Array
from .sft import require_count

# The margin m(r) by how much better the chosen answer was judged (table 27), two variants.
MARGINS: Mapping[str, Mapping[str, float]] = {
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0},
}
UNSAFE_BELOW = 0.15  # of the safety score after sigmoid: 0.89 precision, 0.55 recall in the paper


def score_at(values_BT: Array, mask_BT: Array) -> Array:
    """Return the value [B] at the last real token of each row (section 3.2.2).

    The reward model's head gives a scalar at every token; a sequence's score is that at its last
    one, its end token, whether the row is padded on the left, on the right or not at all. Other
    practice reads the token before the end, or finds the end by the padding's id, which fails
    where the end token pads as well. Raises InputError for a row without a real token.
    """
    rows, last = last_real(mask_BT)
    if len(rows) < len(mask_BT):
        missing = np.flatnonzero(~mask_BT.any(axis=1)).tolist()
        raise InputError(f"mask: row {missing[0]} has no real token; leave the row out")
    scores: Array = values_BT[rows, last]
    return scores


def score_at_vjp(mask_BT: Array, d_scores_B: Array) -> Array:
    """Return d_values [B, T]: d_scores at each row's last real token, 0 elsewhere."""
    d_values = np.zeros(mask_BT.shape, d_scores_B.dtype)
    rows, last = last_real(mask_BT)
    d_values[rows, last] = d_scores_B[rows]
    return d_values


def margin(strength: str, scale: str) -> float:
    """Return m(r) of a preference strength (section 3.2.2, table 27).

    strength  "significantly", "better", "slightly" or "negligibly" (better, or unsure).
    scale     "small" (1, 2/3, 1/3, 0) or "large" (3, 2, 1, 0). The paper measures both and does
              not say which one the released models had: the caller chooses.
    """
    if scale not in MARGINS:
        raise InputError(f"scale: {scale!r}; choose one of {', '.join(MARGINS)}")
    if strength not in MARGINS[scale]:
        known = ", ".join(MARGINS[scale])
        raise InputError(f"strength: {strength!r}; choose one of {known}")
    return MARGINS[scale][strength]


def pair_loss(chosen_B: Array, rejected_B: Array, margins_B: Array, count: int) -> float:
    """Return ``sum(-log sigmoid(r_c - r_r - m)) / count`` (section 3.2.2, eq. 2; eq. 1 for m = 0).

    ``count`` is the number of pairs of the whole step, so that parts of it add up to its mean. The
    three arrays are [B]: a margin [B] beside scores [B, 1] would become [B, B], and is refused.
    """
    gaps = _gaps(chosen_B, rejected_B, margins_B)
    require_count(count)
    return float(np.sum(_minus_log_sigmoid(gaps))) / count


def pair_loss_vjp(
    chosen_B: Array, rejected_B: Array, margins_B: Array, count: int
) -> tuple[Array, Array]:
    """Return d_chosen = -sigmoid(-z) / count and d_rejected = -d_chosen [B], z = r_c - r_r - m.

    As d(-log sigmoid(z))/dz = sigmoid(z) - 1 = -sigmoid(-z).
    """
    gaps = _gaps(chosen_B, rejected_B, margins_B)
    require_count(count)
    d_chosen: Array = -ops.sigmoid(-gaps) / count
    return d_chosen, -d_chosen


def safety_loss(scores_B: Array, labels_B: Array, count: int) -> float:
    """Return the auxiliary safety loss, ``sum(-log sigmoid(s r)) / count`` (appendix A.3.4).

    labels_B  1 for a safe answer (s = 1), 0 for an unsafe one (s = -1), IGNORE for neither.
    count     the labelled answers of the whole step.

    The paper trains "to discriminate between safe and unsafe" with the threshold 0.5 after
    sigmoid, and gives no formula: this is binary cross-entropy, whose threshold that is. It is
    added to ``pair_loss``.
    """
    labelled = labels_B != IGNORE
    require_count(count)
    signs = 2 * labels_B[labelled] - 1
    return float(np.sum(_minus_log_sigmoid(scores_B[labelled] * signs))) / count


def safety_loss_vjp(scores_B: Array, labels_B: Array, count: int) -> Array:
    """Return d_scores = -s sigmoid(-s r) / count [B], and 0 for IGNORE."""
    labelled = labels_B != IGNORE
    require_count(count)
    signs = (2 * labels_B[labelled] - 1).astype(scores_B.dtype)
    d_scores = np.zeros_like(scores_B)
    d_scores[labelled] = -signs * ops.sigmoid(-signs * scores_B[labelled]) / count
    return d_scores


def combined_score(helpful_B: Array, safe_B: Array, tagged_B: Array) -> Array:
    """Return logit(R_c) [B], R_c before whitening (section 3.2.3).

    ``R_c = R_s where the prompt is tagged or R_s < 0.15, else R_h``. helpful_B and safe_B are the
    two models' linear scores, R = sigmoid(score): the threshold is of R_s, and logit(R) is the
    score itself, so that no sigmoid is taken back. ``tagged_B`` marks prompts that may elicit
    unsafe answers.
    """
    takes_safety = tagged_B | (ops.sigmoid(safe_B) < UNSAFE_BELOW)
    chosen: Array = np.where(takes_safety, safe_B, helpful_B)
    return chosen


def combined_reward(
    helpful_B: Array, safe_B: Array, tagged_B: Array, joint: Moments | None = None
) -> Array:
    """Return ``WHITEN(LOGIT(R_c))`` [B], the score of eq. 4 before its KL term (section 3.2.3).

    ``joint`` as in ``whiten``: the moments of ``combined_score`` over the whole batch.
    """
    scores = combined_score(helpful_B, safe_B, tagged_B)
    return whiten(scores, np.ones(scores.shape, bool), joint=joint)


def _gaps(chosen_B: Array, rejected_B: Array, margins_B: Array) -> Array:
    """Return z = r_c - r_r - m [B]; InputError unless all three are vectors of one length."""
    shapes = [x.shape for x in (chosen_B, rejected_B, margins_B)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise InputError(f"scores and margins have shapes {shapes}; each must be [B]")
    gaps: Array = chosen_B - rejected_B - margins_B
    return gaps


def _minus_log_sigmoid(z: Array) -> Array:
    """Return ``log(1 + e^-z)`` without overflow, as ``max(-z, 0) + log1p(e^-|z|)``."""
    loss: Array = np.maximum(-z, 0) + np.log1p(np.exp(-np.abs(z)))
    return loss
