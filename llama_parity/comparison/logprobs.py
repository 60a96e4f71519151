"""Derive the log-probabilities of given tokens from logits, with the bounds of their errors.

Engines that train and engines that generate often show nothing else of a model. Axes: B batch,
T tokens of the call, V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np

from reference_np.ops import IGNORE, Array, log_sum_exp
from reference_np.tolerances import (
    BASELINE_FACTOR,
    FLOAT64_TOLERANCE,
    FLOOR_ROUNDINGS,
    UNIT_ROUNDOFF,
    Errors,
    errors,
    sequential_sum_error,
)

from .trace_file import TraceFile
from .trace_format import LOGPROBS, Call

MANY = 16  # targets, of whose errors the rms is no single draw
# What a program may have written in place of log-probabilities, and how it differs from them.
SLIPS = (
    ("their negatives, the losses of the tokens: write log p", lambda x: -x),
    ("probabilities: write their natural logarithm", np.exp),
    ("logarithms of base 2: multiply them by log(2)", lambda x: x / math.log(2)),
    ("logarithms of base 10: multiply them by log(10)", lambda x: x / math.log(10)),
)


def given_targets(call: Call) -> Array:
    """Return a call's targets [B, T]: the next tokens of the row, unless the trace has its own."""
    if call.targets is not None:
        return call.targets
    targets = np.full_like(call.tokens, IGNORE)
    targets[:, :-1] = call.tokens[:, 1:]
    return targets


def with_targets(calls: Sequence[Call], padding: Sequence[Array | None]) -> list[Call]:
    """Return the calls with the targets whose log-probabilities are judged: none at padding."""
    found = []
    for call, is_padding in zip(calls, padding, strict=True):
        targets = given_targets(call)
        if is_padding is not None:
            targets = np.where(is_padding, IGNORE, targets)
        found.append(call._replace(targets=targets))
    return found


def judged_targets(
    calls: Sequence[Call], padding: Sequence[Array | None], trace: TraceFile
) -> list[Call]:
    """Return the calls, with targets where the trace has log-probabilities of any, else without."""
    return [
        call if has_targets(call) and trace.has(c, LOGPROBS) else call._replace(targets=None)
        for c, call in enumerate(with_targets(calls, padding))
    ]


def has_targets(call: Call) -> bool:
    """Return whether a call has a target."""
    return call.targets is not None and bool((call.targets != IGNORE).any())


def target_logprobs(logits_BTV: Array, targets_BT: Array) -> Array:
    """Return ``l_target - log Z`` [B, T] in the dtype of the logits; 0 where there is no target."""
    valid = targets_BT != IGNORE
    index = np.where(valid, targets_BT, 0)[..., None]
    chosen = np.take_along_axis(logits_BTV, index, axis=-1) - log_sum_exp(logits_BTV)
    found: Array = np.where(valid, chosen[..., 0], 0)
    return found.astype(logits_BTV.dtype)


def at_targets(logprobs: Array, targets_BT: Array) -> Array:
    """Return log-probabilities with 0 where there is no target, those of another shape as is."""
    if logprobs.shape != targets_BT.shape:
        return logprobs
    return np.where(targets_BT == IGNORE, 0.0, logprobs)


def softmax_bound(logits_BTV: Array, targets_BT: Array, dtype: str) -> Array:
    """Bound the error of each log-probability [B, T] that is computed from these very logits.

    The logits' log-softmax is computed in float32 at least, and its result stored in ``dtype``.
    Subtractions and the logarithm round numbers of the size of l_target and log Z; the sum of V
    positive terms may be taken in a plain loop.
    """
    logits = logits_BTV.astype(np.float64, copy=False)
    log_z = log_sum_exp(logits)[..., 0]
    logprobs = target_logprobs(logits, targets_BT)
    sizes = 1.0 + np.abs(log_z) + np.abs(log_z + logprobs)
    if dtype == "float64":
        return FLOAT64_TOLERANCE * sizes
    unit = min(UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF["float32"])
    summed = BASELINE_FACTOR * sequential_sum_error(logits.shape[-1], dtype)
    bound: Array = FLOOR_ROUNDINGS * unit * sizes + summed
    return bound + 2 * UNIT_ROUNDOFF[dtype] * np.abs(logprobs)


def logprob_bound(logits_BTV: Array, softmax_bound_BT: Array, logits_bound: Errors) -> Array:
    """Bound the error of each log-probability [B, T] whose logits are within their own bound.

    With e the error of the logits, ``log p`` moves by ``e_target - log sum p exp(e)``, and the
    second term lies between the smallest and the largest e: at most twice the largest |e|, which
    ``logits_bound.worst`` allows to a single logit.
    """
    largest = logits_bound.worst * float(np.abs(logits_BTV).max())
    bound: Array = 2 * largest + softmax_bound_BT
    return bound


def rms_bound(
    logprobs_BT: Array, composed: Errors, softmax_bound_BT: Array, targets_BT: Array
) -> float:
    """Bound the rms of the errors of many log-probabilities, relative to their own rms.

    The worst case of every token at once is far beyond what happens: of ``MANY`` targets or more
    the rms may be as large as the baseline's allows, and as the log-softmax alone makes it.
    """
    valid = targets_BT != IGNORE
    size = math.sqrt(float(np.mean(logprobs_BT**2)))
    if valid.sum() < MANY or size == 0:
        return math.inf
    own = math.sqrt(float(np.mean(np.where(valid, softmax_bound_BT, 0.0) ** 2)))
    return composed.rms + own / size


def find_slip(theirs: Array, exact: Array, targets_BT: Array) -> str:
    """Return what was written in place of the exact log-probabilities, "" where it is none known.

    It is recognised by an error that is hundreds of times less than as it stands.
    """
    valid = targets_BT != IGNORE
    if theirs.shape != exact.shape or not np.isfinite(theirs).all() or valid.sum() < 2:
        return ""
    with np.errstate(all="ignore"):
        tried = [(text, make(exact)) for text, make in SLIPS]
    pairs = [(text, theirs[valid], value[valid]) for text, value in tried]
    both = valid[:, :-1] & valid[:, 1:]
    if both.sum() >= 2:
        early = theirs[:, 1:][both], exact[:, :-1][both]
        pairs.append(("each one position late: a target follows its position", *early))
    as_is = errors(theirs[valid], exact[valid]).rms
    for text, found, value in pairs:
        if errors(found, value).rms * 300 < as_is:
            return text
    return ""
