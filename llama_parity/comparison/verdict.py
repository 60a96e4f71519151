"""State a comparison's verdict: PASS, INCOMPLETE or FAIL, and how much of it was judged."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from reference_np.tolerances import Errors

from .judging import DOCUMENTED, OPERATION, Measure, Row
from .sides import Recording, is_covered, is_lost
from .trace_format import LOGPROBS, Call

MOST_LISTED = 3  # numbers of a list in the verdict's line


class Extent(NamedTuple):
    """How much was compared: names of the rows, and what is not among them.

    ``noun`` names the rows, with the calls and steps that they are of; ``unseen`` lists what the
    other side leaves out by choice, ``unjudged`` what it declares or shows and nobody could judge.
    """

    noun: str
    unseen: Sequence[str] = ()
    unjudged: Sequence[str] = ()
    uncalled: Sequence[str] = ()  # methods that a backend offers


def verdict(
    rows: Sequence[Row], expected: int, calls: Sequence[Call], extent: Extent
) -> dict[str, Any]:
    """Return the report's "verdict".

    PASS, where every expected row is within bounds and all that the other side declares was
    judged; INCOMPLETE, where only the rows hold; else FAIL.
    """
    noun, held = extent.noun, sum(row.held for row in rows)
    compared = sum(row.compared for row in rows)
    holds = bool(rows) and held == expected == len(rows)
    within = f"{held} of {expected} {noun} within bounds"
    if holds:
        closest = max(rows, key=_share)
        line = f"{'INCOMPLETE' if extent.unjudged else 'PASS'}: {within}; the closest is "
        line += f"{place(closest, calls)} at {_share(closest):.0%} of its bound"
    elif first := next((row for row in rows if row.wrong), None):
        line = f"FAIL: {within}; first divergence at {place(first, calls)}: {operation(first)} "
        line += f"({_reason(first)})"
    elif first := next((row for row in rows if row.status == "inherits"), None):
        line = f"FAIL: {within}; every operation is right by itself, but errors add up: first "
        line += f"beyond the bound at {place(first, calls)}{_documented(rows)}"
    else:
        line = f"FAIL: {compared} of {expected} {noun} compared"
    for title, left_out in (("not judged", extent.unjudged), ("not seen", extent.unseen)):
        line += f"; {title}: {', '.join(left_out)}" if left_out else ""
    if holds and extent.uncalled:  # of what fails the wrong rows say enough
        line += f"; not called: {', '.join(extent.uncalled)}"
    return {
        "holds": holds and not extent.unjudged,
        "compared": compared,
        "expected": expected,
        "unjudged": list(extent.unjudged),
        "unseen": list(extent.unseen),
        "uncalled": list(extent.uncalled),
        "line": line,
    }


def _documented(rows: Sequence[Row]) -> str:
    """Return what says that operations are right by a declared difference alone; "" for none."""
    kinds = dict.fromkeys(row.kind for row in rows if row.status == DOCUMENTED and row.fresh)
    if not kinds:
        return ""
    are = "are" if len(kinds) > 1 else "is"
    return f" ({' and '.join(kinds)} {are} within the bound of declared float32 angles alone)"


def extent_noun(
    noun: str, recording: Recording, calls: Sequence[Call], steps: tuple[int, int]
) -> str:
    """Return the noun of the rows with the calls and steps that they are of, unless it is all.

    ``steps``: how many of a trace's training steps were judged, and how many it has.
    """
    covered = sum(map(is_covered, recording.coverage))
    parts = [f"{covered} of {len(calls)} calls"] if covered < len(calls) else []
    parts += [f"{steps[0]} of {steps[1]} training steps"] if steps[0] < steps[1] else []
    return f"{noun} in {' and '.join(parts)}" if parts else noun


def unseen_outputs(recording: Recording) -> list[str]:
    """Return the outputs that a trace shows of no call, for the verdict."""
    shown = set(recording.coverage)
    if "activations" in shown or not shown:
        return []
    return ["activations", *([] if "logits" in shown else ["the probabilities of other tokens"])]


def unjudged_calls(recording: Recording, calls: Sequence[Call]) -> list[str]:
    """Return the calls of a trace without an output to judge, and those that it does not list."""
    lost = [c for c, covers in enumerate(recording.coverage) if is_lost(covers)]
    unlisted = recording.trace.unlisted_calls
    found = [f"{listed('call', lost)} of {len(calls)}"] if lost else []
    return found + ([f"{listed('call', unlisted)}, not among its calls"] if unlisted else [])


def listed(noun: str, numbers: Sequence[int]) -> str:
    """Return the noun, in the plural unless it is one, with its numbers, the first of many."""
    shown = [str(number) for number in numbers[:MOST_LISTED]]
    if (left := len(numbers) - len(shown)) > 0:
        shown.append(f"{left} more")
    numbered = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"{noun}{'' if len(numbers) == 1 else 's'} {numbered}"


def operation(row: Row) -> str:
    """Return the name of the operation that a row measures: the whole model for logits alone."""
    if row.kind not in OPERATION:
        return "the training step"
    if row.name in ("logits", LOGPROBS) and row.compared and row.fresh is None:
        return "the whole model, of which nothing else is shown"
    return OPERATION[row.kind]


def place(row: Row, calls: Sequence[Call]) -> str:
    """Return a row's name with its call's."""
    return f"{row.name} ({calls[row.call].name})" if row.kind in OPERATION else row.name


def _reason(row: Row) -> str:
    """Return by how much a wrong row errs, or why it could not be compared."""
    if row.operation_error is not None:
        kind, error, bound = _worst(row.operation_error)
        return f"{kind} error {error:.1e}, bound {bound:.1e}"
    return row.detail.removeprefix("in ") if row.status == "misshapen" else row.status


def _share(row: Row) -> float:
    return max(m.share for m in (row.inherited, row.fresh) if m is not None)


def _worst(measure: Measure) -> tuple[str, float, float]:
    """Return the kind of error that is the largest share of its bound, with both numbers."""
    shares = measure.error.shares(measure.bound)
    k = shares.index(max(shares))
    return Errors._fields[k], measure.error[k], measure.bound[k]
