"""Build the report of a comparison, one dictionary; text_report.py and html_report.py show it.

``--json`` prints this dictionary. The name of its schema changes when a key goes or means
something else; a new key may come.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import Errors, kl_per_token

from .diagnosis import HOW, Diagnosis, Explanation
from .differences import StageResult
from .engine_report import logprob_entry
from .judging import KL, REORDERED, Measure, Row
from .logprobs import find_slip
from .padding import Padding
from .trace_format import LOGPROBS, Call
from .verdict import operation, place

SCHEMA = "llama-compare/2"
CELLS = 256  # largest number of columns of the heat map


class ReportBuilder:
    """Collects the rows of a comparison, its first divergence, its heat map and the logits' KL.

    No activation is kept. ``padding``: by call, the tokens that are not judged.
    """

    def __init__(self, calls: Sequence[Call], padding: Padding) -> None:
        self.calls, self.padding = calls, padding
        self.rows: list[Row] = []
        self.first_divergence: dict[str, Any] | None = None
        self.heatmap: dict[str, Any] | None = None
        self.logits: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.slips: list[str] = []  # of programs that write something else than log-probabilities

    def add(self, stage: StageResult) -> None:
        """Add the rows and the logits of one stage."""
        self.rows += stage.rows
        wrong = next((row for row in stage.rows if row.wrong), None)
        if wrong is not None and self.first_divergence is None:
            self._locate(wrong, stage)
        for c, call in enumerate(self.calls):
            self._add_logprobs(c, call, stage)
            theirs, exact = (x.get((c, "logits")) for x in (stage.theirs, stage.free_running))
            if exact is None or theirs is None or theirs.shape != exact.shape:
                continue
            if np.isfinite(kl := kl_per_token(theirs, exact)).all():
                changed = int(np.sum(theirs.argmax(-1) != exact.argmax(-1)))
                self.logits.append(self._distance(c, kl, changed))

    def _distance(self, c: int, kl_BT: Array, changed: int) -> dict[str, Any]:
        """Return the entry of a call's logits: the KL of every token, null of those not judged."""
        kl = np.maximum(kl_BT, 0.0).astype(object)  # rounding makes some a little negative
        if (unjudged := self.padding[c]) is not None:
            kl[unjudged] = None  # their logits are zeros on both sides
        name = self.calls[c].name
        return {"call": c, "name": name, "kl": kl.tolist(), "changed": changed}

    def _add_logprobs(self, c: int, call: Call, stage: StageResult) -> None:
        """Add the distance of a call's log-probabilities from the oracle's, and a known slip."""
        theirs, exact = (x.get((c, LOGPROBS)) for x in (stage.theirs, stage.free_running))
        if entry := logprob_entry(c, call, theirs, exact):
            self.logprobs.append(entry)
        if theirs is None or exact is None or call.targets is None or self.slips:
            return
        if text := find_slip(theirs, exact, call.targets):
            self.slips.append(f"{LOGPROBS} of {call.name} are {text}.")

    def _locate(self, row: Row, stage: StageResult) -> None:
        """Find where the first wrong activation errs, and make its heat map."""
        self.first_divergence = {
            "call": row.call,
            "name": row.name,
            "operation": operation(row),
            "where": "",
        }
        self.first_divergence["where"] = row.detail
        key = (row.call, "logits" if row.name == KL else row.name)
        activations = stage.free_running if row.fresh is None else stage.teacher_forced
        exact, measure = activations.get(key), row.operation_error
        if exact is None or measure is None or not np.isfinite(exact).all():
            return
        theirs = stage.theirs[key]
        self.first_divergence["where"] = error_location(theirs, exact, measure.bound)
        self.heatmap = heat_map(theirs, exact) | {"call": row.call, "name": row.name}


def error_location(theirs: Array, exact: Array, bound: Errors) -> str:
    """Return how many tokens, heads and channels of [B, T, ..., C] hold errors beyond the bound."""
    wrong = np.abs(theirs - exact) > bound.worst * np.abs(exact).max()
    if not wrong.any():
        return "spread thinly over all of it"
    counts = [("tokens", wrong.any(axis=tuple(range(2, wrong.ndim))))]
    if wrong.ndim == 4:
        counts.append(("heads", wrong.any(axis=(0, 1, 3))))
    if wrong.ndim > 2:
        counts.append(("channels", wrong.any(axis=tuple(range(wrong.ndim - 1)))))
    return "in " + ", ".join(f"{int(hit.sum())} of {hit.size} {axis}" for axis, hit in counts)


def heat_map(theirs: Array, exact: Array) -> dict[str, Any]:
    """Return |error| over the rms of ``exact`` [B, T, ...] for the worst sequence, [token][cell].

    A cell is the largest error of so many channels that there are at most ``CELLS``.
    """
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


def reordered_warning(rows: Sequence[Row], calls: Sequence[Call]) -> str:
    """Return a warning of activations that hold the right numbers in another order, or ""."""
    wrong = [row for row in rows if row.status == REORDERED]
    if not wrong:
        return ""
    more = f", and so do {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return (
        f"{place(wrong[0], calls)} holds the right numbers in another order{more}: it was written "
        "from a transposed array; write contiguous arrays (np.ascontiguousarray first)."
    )


def explanation_entry(
    explanation: Explanation, calls: Sequence[Call], wrong: int
) -> dict[str, Any]:
    """Return an explanation's dictionary, with its sentence; ``wrong``: how many rows diverge."""
    named = [
        " together with ".join(f"{bug.name} ({bug.sentence}; {bug.citation})" for bug in bugs)
        for bugs in explanation.suspects
    ]
    sentence = f"{place(explanation.row, calls)} {HOW[explanation.how]} {', or '.join(named)}"
    if explanation.how == "value":
        sentence += f"; the error falls from {explanation.before:.1e} to {explanation.after:.1e}"
    elif explanation.how == "size":
        sentence += f"; the error, {explanation.before:.1e}, is of that size"
    if len(named) > 1:
        sentence += "; this input cannot tell them apart"
    sentence += f". It explains {explanation.explains} of {wrong} divergences"
    if explanation.contradictions:
        sentence += (
            f", but would also change {explanation.contradictions} activations that are right"
        )
    return {
        "mutants": [
            {key: getattr(bug, key) for key in ("name", "sentence", "citation", "operation")}
            for bugs in explanation.suspects
            for bug in bugs
        ],
        "how": explanation.how,
        "sentence": f"{sentence}.",
        "explains": explanation.explains,
        "of": wrong,
        "against": explanation.contradictions,
        "before": _number(explanation.before),
        "after": _number(explanation.after),
    }


def row_entry(row: Row) -> dict[str, Any]:
    """Return a row's dictionary: its fields, its layer and its kind."""
    entry = row._asdict() | {"layer": row.layer, "kind": row.kind}
    del entry["detail"]  # first_divergence has it
    return entry | {key: _measure(getattr(row, key)) for key in ("inherited", "fresh")}


def diagnosis_entries(
    diagnosis: Diagnosis, rows: Sequence[Row], calls: Sequence[Call]
) -> dict[str, Any]:
    """Return the report's part about a diagnosis; ``rows`` are all that were compared."""
    wrong = sum(row.status == "diverges" for row in rows if row.name != KL)
    return {
        "diagnosis": [explanation_entry(one, calls, wrong) for one in diagnosis.explanations],
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
