"""What a comparison found, as one dictionary; text_report.py and html_report.py show it.

The schema of the dictionary is what ``--json`` prints. Its name changes when a key does.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import Errors, kl_per_token

from .diagnosis import HOW, Diagnosis, Finding
from .differences import Compared
from .judging import KL, OPERATION, REORDERED, Measure, Row
from .trace_file import Call

SCHEMA = "llama-compare/1"
CELLS = 256  # columns of the heat map


class Findings:
    """Collects what the stages of a comparison show, keeping no arrays but small ones."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.rows: list[Row] = []
        self.first: dict[str, Any] | None = None
        self.heatmap: dict[str, Any] | None = None
        self.logits: list[dict[str, Any]] = []

    def add(self, stage: Compared) -> None:
        """Take in one stage."""
        self.rows += stage.rows
        wrong = next((row for row in stage.rows if row.wrong), None)
        if wrong is not None and self.first is None:
            self._locate(wrong, stage)
        for c, call in enumerate(self.calls):
            theirs, exact = stage.theirs.get((c, "logits")), stage.free.get((c, "logits"))
            if exact is None or theirs is None or theirs.shape != exact.shape:
                continue
            if np.isfinite(theirs).all() and np.isfinite(exact).all():
                kl = kl_per_token(theirs, exact)
                changed = int(np.sum(theirs.argmax(-1) != exact.argmax(-1)))
                entry = {"call": c, "name": call.name, "kl": kl.tolist(), "changed": changed}
                self.logits.append(entry)

    def _locate(self, row: Row, stage: Compared) -> None:
        """Say where in its tensor the first wrong activation is wrong, and picture it."""
        self.first = {
            "call": row.call,
            "name": row.name,
            "operation": operation(row),
            "where": "",
        }
        key = (row.call, "logits" if row.name == KL else row.name)
        exact = stage.free.get(key) if row.fresh is None else stage.forced.get(key)
        if exact is None or row.own is None or not np.isfinite(exact).all():
            return
        self.first["where"] = where(stage.theirs[key], exact, row.own.bound)
        self.heatmap = heat_map(stage.theirs[key], exact) | {"call": row.call, "name": row.name}


def operation(row: Row) -> str:
    """Name what a row is the result of: one operation only where its own error is known."""
    if row.kind not in OPERATION:
        return "the training step"
    if row.name == "logits" and row.compared and row.fresh is None:
        return "the whole model, of which nothing else is shown"
    return OPERATION[row.kind]


def where(theirs: Array, exact: Array, bound: Errors) -> str:
    """Count the tokens, heads and channels that hold errors beyond the bound."""
    wrong = np.abs(theirs - exact) > bound.worst * np.abs(exact).max()
    if not wrong.any():
        return "spread thinly over all of it"
    counts = [("tokens", wrong.any(axis=tuple(range(2, wrong.ndim))))]
    if wrong.ndim == 4:
        counts.append(("heads", wrong.any(axis=(0, 1, 3))))
    counts.append(("channels", wrong.any(axis=tuple(range(wrong.ndim - 1)))))
    return "in " + ", ".join(f"{int(hit.sum())} of {hit.size} {what}" for what, hit in counts)


def heat_map(theirs: Array, exact: Array) -> dict[str, Any]:
    """Return |error| over the tensor's rms for the worst row of the batch, [token][channel]."""
    size = math.sqrt(float(np.mean(exact**2))) or 1.0
    error = (np.abs(theirs - exact) / size).reshape(*exact.shape[:2], -1)
    row = int(error.max(axis=(1, 2)).argmax())
    channels = error.shape[-1]
    per_cell = -(-channels // CELLS)
    cells = np.pad(error[row], ((0, 0), (0, -channels % per_cell)))
    cells = cells.reshape(len(cells), -1, per_cell).max(axis=-1)
    return {
        "row": row,
        "error": np.round(cells, 12).tolist() if cells.max() > 1e-6 else cells.tolist(),
        "channels_per_cell": per_cell,
        "channels": channels,
    }


def verdict(
    rows: Sequence[Row], expected: int, calls: Sequence[Call], what: str, covered: int
) -> dict[str, Any]:
    """Return whether all holds, in one line; agreement over nothing is not agreement."""
    if covered < len(calls):  # less may be offered, and then that is part of the answer
        what += f" in {covered} of {len(calls)} calls"
    compared = sum(row.compared for row in rows)
    held = sum(row.status == "ok" for row in rows)
    wrong = [row for row in rows if row.wrong]
    entry = {"holds": False, "compared": compared, "expected": expected}
    if wrong:
        first = wrong[0]
        why = first.status
        if first.own is not None:
            kind, error, bound = _worst(first.own)
            why = f"{kind} error {error:.1e}, bound {bound:.1e}"
        line = f"FAIL: {held} of {expected} {what} within bounds; first divergence at "
        line += f"{_place(first, calls)}: {operation(first)} ({why})"
    elif held < len(rows):
        first = next(row for row in rows if row.status == "inherits")
        line = f"FAIL: {held} of {expected} {what} within bounds; every operation is right by "
        line += f"itself, but errors add up: first beyond the bound at {_place(first, calls)}"
    elif held != expected or not rows:
        line = f"FAIL: {compared} of {expected} {what} compared"
    else:
        closest = max(rows, key=_share)
        line = f"PASS: {held} of {expected} {what} within bounds; the closest is "
        line += f"{_place(closest, calls)} at {_share(closest):.0%} of its bound"
        entry["holds"] = True
    return entry | {"line": line}


def reordered(rows: Sequence[Row], calls: Sequence[Call]) -> str:
    """Say which activations hold the right numbers in another order, and why; may be empty."""
    found = [row for row in rows if row.status == REORDERED]
    if not found:
        return ""
    more = f", and so do {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{_place(found[0], calls)} holds the right numbers in another order{more}: it was written "
        "from a transposed array; write contiguous arrays (np.ascontiguousarray first)."
    )


def _place(row: Row, calls: Sequence[Call]) -> str:
    return f"{row.name} ({calls[row.call].name})" if row.kind in OPERATION else row.name


def _share(row: Row) -> float:
    return max(m.share for m in (row.inherited, row.fresh) if m is not None)


def _worst(measure: Measure) -> tuple[str, float, float]:
    """Return the kind of error that is the largest share of its bound, with both numbers."""
    shares = measure.error.shares(measure.bound)
    k = shares.index(max(shares))
    return Errors._fields[k], measure.error[k], measure.bound[k]


def finding_entry(finding: Finding, calls: Sequence[Call], wrong: int) -> dict[str, Any]:
    """Return a finding with its sentence; ``wrong`` counts all that diverge."""
    named = [
        " together with ".join(f"{bug.name} ({bug.sentence}; {bug.citation})" for bug in bugs)
        for bugs in finding.suspects
    ]
    sentence = f"{_place(finding.row, calls)} {HOW[finding.how]} {', or '.join(named)}"
    if finding.how == "value":
        sentence += f"; the error falls from {finding.before:.1e} to {finding.after:.1e}"
    elif finding.how == "size":
        sentence += f"; the error, {finding.before:.1e}, is of that size"
    if len(named) > 1:
        sentence += "; this input cannot tell them apart"
    sentence += f". It explains {finding.explains} of {wrong} divergences"
    if finding.against:
        sentence += f", but would also change {finding.against} activations that are right"
    return {
        "mutants": [
            {key: getattr(bug, key) for key in ("name", "sentence", "citation", "operation")}
            for bugs in finding.suspects
            for bug in bugs
        ],
        "how": finding.how,
        "sentence": f"{sentence}.",
        "explains": finding.explains,
        "of": wrong,
        "against": finding.against,
        "before": _number(finding.before),
        "after": _number(finding.after),
    }


def row_entry(row: Row) -> dict[str, Any]:
    """Return a row's dictionary."""
    entry = row._asdict() | {"layer": row.layer, "kind": row.kind}
    return entry | {key: _measure(getattr(row, key)) for key in ("inherited", "fresh")}


def diagnosis_entries(
    diagnosis: Diagnosis, rows: Sequence[Row], calls: Sequence[Call]
) -> dict[str, Any]:
    """Return a diagnosis's part of the report."""
    wrong = sum(row.status == "diverges" for row in rows if row.name != KL)
    return {
        "diagnosis": [finding_entry(finding, calls, wrong) for finding in diagnosis.findings],
        "unexplained": len(diagnosis.unexplained),
        "diverging": wrong,
    }


def _measure(measure: Measure | None) -> dict[str, Any] | None:
    if measure is None:
        return None
    error, bound = ({k: _number(v) for k, v in part._asdict().items()} for part in measure[:2])
    return {**error, "bound": bound, "share": _number(measure.share)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
