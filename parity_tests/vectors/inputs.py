"""Compare the inputs of a port's trace with a golden vector's.

Axes: B batch, T tokens of the call, S cached + T.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llama_parity.comparison.trace_file import TraceFile
from llama_parity.comparison.trace_format import Step, batch_inputs, call_inputs, n_cached
from reference_np.ops import IGNORE, Array, causal_mask, next_positions

from .reading import Ranges, real_tokens

WORDS = {
    **{"tokens": "other tokens", "positions": "other positions"},
    **{"mask": "another mask", "targets": "other targets"},
}


def other_inputs(theirs: TraceFile, ours: TraceFile, real: Sequence[Ranges | None]) -> str:
    """Return how a trace's inputs differ from the case's over real tokens, "" where they do not.

    Positions, a mask and targets that a trace leaves out are not missed: the results tell whether
    they were used.
    """
    if len(theirs.calls) != len(ours.calls) or len(theirs.steps) != len(ours.steps):
        return (
            f"it has {len(theirs.calls)} calls and {len(theirs.steps)} steps, "
            f"not {len(ours.calls)} and {len(ours.steps)}"
        )
    for c, (mine, yours) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        if mine.after != yours.after:
            return f"call {c} continues another call"
        expected = _complete(call_inputs(mine), n_cached(ours.calls, c))
        if other := _other(expected, call_inputs(yours), f"call.{c}", real):
            return f"call {c} has {other}"
    for s, (step, their_step) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        if other := _other_batches(step, their_step, s, real):
            return f"step {s} has {other}"
    return ""


def other_settings(theirs: TraceFile, ours: TraceFile) -> str:
    """Return a remark where a trace's config or hyperparameters are not the case's, else ""."""
    pairs = [("config", theirs.config, ours.config)]
    if theirs.hyperparameters is not None and ours.hyperparameters is not None:
        pairs.append(("hyperparameters", theirs.hyperparameters, ours.hyperparameters))
    for what, yours, mine in pairs:
        if other := [
            f"{key} {value}, not {dataclasses.asdict(mine)[key]}"
            for key, value in dataclasses.asdict(yours).items()
            if value != dataclasses.asdict(mine)[key]
        ]:
            return f"; in the trace's {what}: {', '.join(other)}"
    return ""


def _other_batches(mine: Step, yours: Step, s: int, real: Sequence[Ranges | None]) -> str:
    if len(mine.batches) != len(yours.batches):
        return f"{len(yours.batches)} micro-batches, not {len(mine.batches)}"
    for one, other in zip(mine.batches, yours.batches, strict=True):
        expected = _complete(batch_inputs(one), 0)
        if found := _other(expected, batch_inputs(other), f"step.{s}", real):
            return found
    return ""


def _complete(inputs: Mapping[str, Array], cached: int) -> dict[str, Array]:
    """Return a call's inputs, with the positions [B, T] and the mask [B, T, S] that it implies."""
    rows, length = inputs["tokens"].shape
    positions = np.tile(next_positions(length, cached), (rows, 1))
    mask = np.tile(causal_mask(length, cached + length), (rows, 1, 1))
    return {"positions": positions, "mask": mask, **inputs}


def _other(
    mine: Mapping[str, Array], yours: Mapping[str, Array], at: str, real: Sequence[Ranges | None]
) -> str:
    """Return which input of a trace is not the case's, "" where they all are."""
    for name, word in WORDS.items():
        if name not in mine or name not in yours:
            continue
        expected, found = mine[name], yours[name]
        if found.shape == expected.shape:
            expected, found = (real_tokens(real, f"{at}.{name}", x) for x in (expected, found))
        if name == "targets" and at.startswith("call"):
            found = np.where(expected == IGNORE, IGNORE, found)  # what is not judged
        if not np.array_equal(expected, found):
            return word
    return ""
