"""Report how far the log-probabilities of two engines are apart: of training and of generation.

Axes: B batch, T tokens of the call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from reference_np.config import InputError
from reference_np.ops import IGNORE, Array

from .logprobs import at_targets, has_targets, target_logprobs, with_targets
from .padding import find_padding
from .trace_file import TraceFile
from .trace_format import LOGPROBS, Call


def logprob_entry(
    c: int, call: Call, theirs: Array | None, others: Array | None
) -> dict[str, Any] | None:
    """Return the distance of two engines' log-probabilities [B, T] of a call's targets.

    None where either has none, or none that can be subtracted. "k3" estimates the KL divergence
    of the first engine from the second by ``mean(r - 1 - log r)``, r = p_other / p_their, where
    the tokens were drawn from the first engine; no term is negative (Schulman 2020).
    """
    if call.targets is None or theirs is None or others is None or theirs.shape != others.shape:
        return None
    valid = call.targets != IGNORE
    ours, difference = theirs[valid], (theirs - others)[valid]
    if not difference.size or not (np.isfinite(ours).all() and np.isfinite(difference).all()):
        return None
    row, position = np.argwhere(valid)[np.abs(difference).argmax()].tolist()
    ratio = np.minimum(-difference, 700.0)  # whose exponential is still finite
    return {
        "call": c,
        "name": call.name,
        "tokens": int(difference.size),
        "mean": float(difference.mean()),
        "mean_abs": float(np.abs(difference).mean()),
        "largest": float(np.abs(difference).max()),
        "row": row,
        "position": position,
        "k3": float(np.mean(np.expm1(ratio) - ratio)),
    }


class Distances(NamedTuple):
    """How far two engines' log-probabilities are apart, and the calls of which nobody can say."""

    calls: list[dict[str, Any]]
    not_compared: list[str]  # names of calls of which one shows none, or none that is finite


def engine_entries(one: TraceFile, other: TraceFile) -> Distances:
    """Return how far apart two engines' log-probabilities are, for each call that both show.

    Raises InputError for traces of other calls, or without log-probabilities in common.
    """
    calls = with_targets(one.calls, find_padding(one.calls))
    others = with_targets(other.calls, find_padding(other.calls))
    same = len(calls) == len(others) and all(map(_is_same, calls, others))
    if not same or one.config != other.config:
        raise InputError(
            f"--beside {other.path}: not of the calls of {one.path}; write both traces with the "
            "same config, tokens, positions, masks and targets"
        )
    entries: list[dict[str, Any]] = []
    not_compared: list[str] = []
    for c, call in enumerate(calls):
        entry = logprob_entry(c, call, _logprobs(one, c, call), _logprobs(other, c, call))
        if entry is not None:
            entries.append(entry)
        elif has_targets(call):
            not_compared.append(call.name)
    if not entries:
        raise InputError(
            f"--beside {other.path}: no call has log-probabilities, finite ones, in both traces; "
            f"write {LOGPROBS} or logits"
        )
    return Distances(entries, not_compared)


def _is_same(one: Call, other: Call) -> bool:
    """Return whether two calls have the same inputs and targets; their names may differ."""
    return one.after == other.after and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip((*one[1:4], one.targets), (*other[1:4], other.targets), strict=True)
    )


def _logprobs(trace: TraceFile, c: int, call: Call) -> Array | None:
    """Return the log-probabilities of a call's targets, from its logits where it has no others."""
    assert call.targets is not None
    logprobs = trace.read(c, LOGPROBS)
    logits = trace.read(c, "logits") if logprobs is None else None
    if logits is not None and logits.shape == (*call.tokens.shape, trace.config.vocab_size):
        logprobs = target_logprobs(logits.astype(np.float64), call.targets)
    if logprobs is None or logprobs.shape != call.targets.shape:
        return None
    return at_targets(logprobs.astype(np.float64), call.targets)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Return a line for each call of a report's distances: from the oracle, between engines."""
    lines = [sentence(entry, "from the oracle's") for entry in report["logprobs"]]
    if report["engines"] is not None:
        other = f"from those of {report['engines']['beside']}"
        lines += [sentence(entry, other) for entry in report["engines"]["calls"]]
        if names := report["engines"]["not_compared"]:
            lines.append(
                f"Not compared with those of {report['engines']['beside']}, since one trace has "
                f"none, or none that is finite: {'; '.join(names)}."
            )
    return lines


def sentence(entry: Mapping[str, Any], other: str) -> str:
    """Return a line of an entry; ``other`` completes "differ from ..."."""
    return (
        f"log-probabilities of {entry['name']} {other}: {entry['tokens']} tokens differ by "
        f"{entry['mean_abs']:.1e} nats on average, {entry['largest']:.1e} at most (row "
        f"{entry['row']}, position {entry['position']}); k3 estimate of the KL {entry['k3']:.1e}"
    )
