"""Judge errors by the bound of rotary angles that are multiplied in float32.

Many ports multiply position and frequency in float32. The error grows with the position, and
reference_np/angle_error.py bounds it. The oracle runs again with every angle off by that bound; an
error may be BASELINE_FACTOR times as large as what that makes of an activation.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from reference_np.angle_error import ANGLE_PATTERNS, inexact_tables
from reference_np.ops import Array
from reference_np.tolerances import (
    BASELINE_FACTOR,
    FLOAT64_TOLERANCE,
    Errors,
    composed_bound,
    errors,
    kl_bound,
    kl_per_token,
)

from .comparison import Comparison
from .differences import StageResult, start_from_first_layer
from .judging import DOCUMENTED, KL, Measure, Row
from .padding import without_padding
from .replay import Activations, Replay, finite_only

ROTATED = ("q_rope", "k_rope")
# How a backend declares them, and a trace.
BACKENDS_DECLARATION = "limits = reference_np.limits.Limits(float32_angles=({dtype!r},))"
TRACES_DECLARATION = 'it in the metadata of the trace, "float32_angles": "true"'


class Angled(NamedTuple):
    """A stage's activations where angles err: by pattern, free-running and teacher-forced."""

    free_running: list[dict[tuple[int, str], Array]]
    teacher_forced: list[dict[tuple[int, str], Array]]


class Float32Angles:
    """Allows for float32 angles where they are declared, and else notes whether they explain all.

    ``declared``: whether the other side declares them in the precision under test.
    """

    def __init__(self, comparison: Comparison, declared: bool) -> None:
        self.comparison, self.declared = comparison, declared
        # Rows that are beyond their bound and within that of float32 angles, and whether they are
        # all that are beyond.
        self.count = 0
        # In half precision the rounding of everything else is larger.
        self.explains_all = comparison.precision in ("float64", "float32")
        self.largest = 0.0  # error over the bound without the allowance
        self.replays: list[Replay] = []

    def allow(self, stage: int, result: StageResult) -> StageResult:
        """Return a stage's rows, those that float32 angles explain as documented if declared."""
        beyond = [row for row in result.rows if row.compared and not row.held]
        self.explains_all &= all(row.compared for row in result.rows)
        possible = [row for row in beyond if _may_be_of_angles(row, result)]
        self.explains_all &= len(possible) == len(beyond)
        if not possible or not (self.declared or self.explains_all):
            return result
        angled = self._run(stage, result.theirs)
        allowed: dict[tuple[int, str], Row] = {}
        for row in possible:
            wider = self._widened(row, result, angled)
            if all(m.holds for m in (wider.inherited, wider.fresh) if m is not None):
                allowed[row.call, row.name] = wider
                strict = (m.share for m in (row.inherited, row.fresh) if m is not None)
                self.largest = max(self.largest, *strict)
        self.count += len(allowed)
        self.explains_all &= len(allowed) == len(beyond)
        if not self.declared:
            return result
        rows = [allowed.get((row.call, row.name), row) for row in result.rows]
        return result._replace(rows=rows)

    def note(self, declaration: str) -> str:
        """Return a sentence of what float32 angles explain; "" for nothing.

        ``declaration``: how the other side declares them; "" where it cannot.
        """
        if not self.count or not (self.declared or self.explains_all):
            return ""
        dtype = self.comparison.precision
        if self.declared:
            return (
                f"Documented difference: {self.count} activations are off by rotary angles that "
                f"are multiplied in float32, as declared: within that product's bound, and at most "
                f"{self.largest:.2g} times the bound without it."
            )
        declare = f", declare {declaration.format(dtype=dtype)}" if declaration else ""
        return (
            f"All {self.count} errors are those of rotary angles that are multiplied in float32: "
            f"within that product's bound. If this is by design{declare or ', it is documented'}."
        )

    def _run(self, stage: int, theirs: Activations) -> Angled:
        """Run the oracle with inexact angles, after the stages before, where they have not run."""
        comparison, padding = self.comparison, self.comparison.padding
        config, calls, params = comparison.config, comparison.calls, comparison.baseline_params
        operations = dict(vars(comparison.baseline_ops))
        ops = [
            SimpleNamespace(**operations | {"rope_tables": inexact_tables(pattern)})
            for pattern in range(ANGLE_PATTERNS)
        ]
        if not self.replays:
            self.replays = [Replay(config, calls, params, one) for one in ops]
            if comparison.first_layer:
                start_from_first_layer(comparison, self.replays)
        free, forced = [], []
        for replay in self.replays:
            for at in (s for s in comparison.stages() if replay.last_stage < s <= stage):
                activations = replay.run(at)
            free.append(without_padding(activations, padding))
        if comparison.has_activations() and 0 <= stage < config.n_layers:
            given = finite_only(theirs)
            for one in ops:
                found = Replay(config, calls, params, one).run(stage, given)
                forced.append(without_padding(found, padding))
        return Angled(free, forced)

    def _widened(self, row: Row, result: StageResult, angled: Angled) -> Row:
        """Return a row as documented, with the bounds of float32 angles."""
        precision, key = self.comparison.precision, (row.call, row.name)
        if row.name == KL:
            assert row.inherited is not None
            key = (row.call, "logits")
            exact = result.free_running[key]
            kl = max(float(kl_per_token(run[key], exact).max()) for run in angled.free_running)
            limit = kl_bound(kl, float(np.abs(exact).max()), precision)
            wide = Errors(limit, limit, limit)
            return row._replace(status=DOCUMENTED, inherited=Measure(row.inherited.error, wide))
        theirs, exact = result.theirs[key], result.free_running[key]
        runs = [run[key] for run in angled.free_running]
        wider = row._replace(status=DOCUMENTED, inherited=_measure(theirs, exact, runs, precision))
        if row.fresh is None or row.fresh.holds:
            return wider
        runs = [run[key] for run in angled.teacher_forced if key in run]
        exact = result.teacher_forced[key]
        return wider._replace(fresh=_measure(theirs, exact, runs, precision))


def _may_be_of_angles(row: Row, result: StageResult) -> bool:
    """Return whether a row's own operation is right, is the rotation, or is the whole model."""
    if row.name != KL and (row.call, row.name) not in result.free_running:
        return False
    return row.fresh is None or row.fresh.holds or row.kind in ROTATED


def _measure(theirs: Array, exact: Array, runs: Sequence[Array], precision: str) -> Measure:
    """Measure an activation by what the inexact angles of ``runs`` make of it."""
    found = [errors(run, exact) for run in runs]
    widest = Errors(*map(max, zip(Errors(0, 0, 0), *found, strict=True)))
    if not all(map(math.isfinite, widest)):
        widest = Errors(0, 0, 0)  # a run that overflowed excuses nothing
    if precision == "float64":
        bound = Errors(*(FLOAT64_TOLERANCE + BASELINE_FACTOR * error for error in widest))
    else:
        bound = composed_bound(widest, precision)
    return Measure(errors(theirs, exact), bound)
