"""Measure every activation's inherited and fresh error, stage by stage.

Inherited: the other side's activation against the oracle's free-running activation. Fresh:
against the oracle's teacher-forced activation, which is what its operation makes of the other
side's *own* input; only the operation where a bug enters shows a fresh error. Both are measured
against float64, and bounded by the error of the oracle in the precision under test (the baseline).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from reference_np.config import InputError
from reference_np.ops import Array

from .comparison import Comparison
from .judging import KL, REORDERED, Reference, Row, error_bound, judge, judge_kl
from .logprobs import logprob_bound, rms_bound, softmax_bound, target_logprobs
from .padding import Padding, readable, without_padding
from .replay import Activations, Key, Replay, RoundedParams, finite_only, stage_input
from .sum_bounds import n_terms
from .trace_format import LOGPROBS

MAX_BASELINES = 4  # free-running baselines, of which the one that errs most sets a bound


class StageResult(NamedTuple):
    """The rows of a stage, and its activations, which a report may draw."""

    rows: list[Row]
    theirs: Activations
    free_running: Activations
    teacher_forced: Activations


class TeacherForced(NamedTuple):
    """A stage's activations, each computed from the other side's input to its operation."""

    exact: Activations
    baseline: Activations
    element_bounds: Activations  # of attention [B, T, H, K], the norms [B, T, D]

    def without_padding(self, padding: Padding) -> "TeacherForced":
        """Return the activations and their bounds with zeros at padding."""
        return TeacherForced(*(without_padding(part, padding) for part in self))


def compare(comparison: Comparison, advance: Callable[[], None]) -> Iterator[StageResult]:
    """Yield each stage's rows and activations, in order; both sides are read stage by stage.

    Raises InputError where a range of layers cannot start from the other side's residual stream.
    """
    config, calls, precision = comparison.config, comparison.calls, comparison.precision
    exact_free = Replay(config, calls, comparison.exact_params)
    exact_forced = Replay(config, calls, comparison.exact_params, inspects=True)
    baseline_free, baseline_forced = (
        Replay(config, calls, comparison.baseline_params, comparison.baseline_ops) for _ in range(2)
    )
    perturbed, padding = PerturbedBaselines(comparison), comparison.padding
    if comparison.first_layer:
        start_from_first_layer(comparison, (exact_free, baseline_free))
    for stage in comparison.stages():
        theirs = comparison.theirs.read(stage)
        given = finite_only(readable(theirs, padding))
        free = exact_free.run(stage)
        forced = exact_forced.run(stage, given) if comparison.has_activations() else {}
        if comparison.theirs.reorder(exact_forced.orders):
            theirs = comparison.theirs.read(stage)
            given = finite_only(readable(theirs, padding))
        theirs, free = without_padding(theirs, padding), without_padding(free, padding)
        if precision == "float64":
            fresh = TeacherForced(forced, forced, {}).without_padding(padding)
            rows = _judge_stage(comparison, stage, theirs, free, [free], fresh)
        else:
            baseline = without_padding(baseline_free.run(stage), padding)
            low = baseline_forced.run(stage, given) if comparison.has_activations() else {}
            fresh = TeacherForced(forced, low, exact_forced.element_bounds)
            fresh = fresh.without_padding(padding)
            rows = _judge_stage(comparison, stage, theirs, free, [baseline], fresh)
            if _exceeds_inherited(rows):
                moved = (without_padding(run, padding) for run in perturbed.run(stage))
                baselines = [baseline, *moved]
                rows = _judge_stage(comparison, stage, theirs, free, baselines, fresh)
        advance()
        yield StageResult(rows, theirs, free, fresh.exact)


def _exceeds_inherited(rows: Sequence[Row]) -> bool:
    return any(row.inherited is not None and not row.inherited.holds for row in rows)


class PerturbedBaselines:
    """Runs the free-running baseline again, perturbed in other directions by possible rounding.

    How far one rounding grows on its way through the model is a matter of chance (a score of 50 in
    an exponential makes much of it), and the first baseline may have drawn better than the other
    side. These runs cost as much as the first each, and are made only where its bound is exceeded.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.replays: list[Replay] = []

    def run(self, stage: int) -> list[dict[Key, Array]]:
        """Return a stage's activations of each run, after running the stages before it."""
        comparison, params = self.comparison, self.comparison.baseline_params
        if not self.replays:
            for seed in range(1, MAX_BASELINES):
                moved = RoundedParams(params.checkpoint.path, params.precision, params.dtype, seed)
                ops = comparison.baseline_ops
                self.replays.append(Replay(comparison.config, comparison.calls, moved, ops))
            if comparison.first_layer:
                start_from_first_layer(comparison, self.replays)
        by_run = []
        for replay in self.replays:
            for at in (s for s in comparison.stages() if replay.last_stage < s <= stage):
                activations = replay.run(at)
            by_run.append(activations)
        return by_run


def _judge_stage(
    comparison: Comparison,
    stage: int,
    theirs: Activations,
    free: Activations,
    baselines: Sequence[Activations],
    fresh: TeacherForced,
) -> list[Row]:
    """Return a row for every expected activation of a stage."""
    rows, precision = [], comparison.precision
    for c, name in comparison.keys(stage):
        key = (c, name)
        if comparison.theirs.is_reordered(key):
            rows.append(Row(*key, REORDERED))
            continue
        if name == KL:
            rows.append(judge_kl(c, theirs, free, baselines, precision))
            continue
        if name == LOGPROBS:
            rows.append(_judge_logprobs(comparison, c, theirs, free, baselines, fresh))
            continue
        bound = error_bound(free[key], [baseline[key] for baseline in baselines], precision)
        references = [Reference(free[key], bound)]
        if comparison.recording.coverage[c] == "activations":
            exact = fresh.exact[key]
            n = n_terms(comparison.config, name.rpartition(".")[2])
            bound = error_bound(exact, [fresh.baseline[key]], precision, n)
            references.append(Reference(exact, bound, fresh.element_bounds.get(key)))
        rows.append(judge(key, theirs.get(key), references))
    return rows


def _judge_logprobs(
    comparison: Comparison,
    c: int,
    theirs: Activations,
    free: Activations,
    baselines: Sequence[Activations],
    fresh: TeacherForced,
) -> Row:
    """Return the row of the log-probabilities of a call's targets.

    Their fresh error is that of the log-softmax of the other side's own logits, where it shows
    them; without them all error counts as inherited, or as the whole model's.
    """
    key, targets, precision = (c, LOGPROBS), comparison.calls[c].targets, comparison.precision
    assert targets is not None
    logits = free[c, "logits"]
    of_logits = error_bound(logits, [each[c, "logits"] for each in baselines], precision)
    bound = error_bound(free[key], [each[key] for each in baselines], precision)
    own = softmax_bound(logits, targets, precision)
    derived = logprob_bound(logits, own, of_logits)
    references = [Reference(free[key], bound, derived, rms_bound(free[key], bound, own, targets))]
    shown = theirs.get((c, "logits"))
    if shown is not None and shown.shape == logits.shape and np.isfinite(shown).all():
        exact = target_logprobs(shown, targets)
        derived = softmax_bound(shown, targets, precision)
        references.append(Reference(exact, error_bound(exact, [exact], precision), derived))
    return judge(key, theirs.get(key), references)


def start_from_first_layer(comparison: Comparison, replays: Sequence[Replay]) -> None:
    """Set the residual streams of free-running replays to the other side's.

    Raises InputError for a stream that is missing, of another shape or not finite.
    """
    name = stage_input(comparison.first_layer)
    for c, call in enumerate(comparison.calls):
        stream = comparison.recording.trace.read(c, name)
        if stream is not None:
            stream = readable({(c, name): stream}, comparison.padding)[c, name]
        for replay in replays:
            usable = stream is not None and np.isfinite(stream).all()
            if not (usable and replay.start_from(c, stream)):
                raise InputError(
                    f"--layers {comparison.first_layer}: {name} of the call {call.name!r} is "
                    "missing, misshapen or not finite on the other side; begin at a layer before it"
                )
