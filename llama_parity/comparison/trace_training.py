"""Judge the training steps of a trace file, by the bounds of a step that both sides take.

Each step starts from the trace's own state before it, parameters and moments, so that an error is
that step's; the first one starts from the checkpoint. Where the trace lacks the moments, what the
parameters decide is judged: the loss, its gradients and their norm. Whole models are held in
memory.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reference_np.naming import parameter_shapes
from reference_np.ops import Array
from reference_np.optim import Hyperparameters, OptState

from .diagnosis import Diagnosis, Explanation
from .judging import Row
from .progress import Start
from .replayed_step import RUN, StepStart, judge_step
from .source import Source
from .trace_file import TraceFile
from .trace_format import AFTER_UPDATE, STEP_SCALARS
from .training_step import as_tokens, exact_and_low_params, update_values
from .training_task import Task
from .verdict import listed

# What a step may show, and the kind of its tensors.
SHOWN = {
    "losses": "loss",
    "gradient norms": "grad_norm",
    "gradients": "grad",
    "updates": "param",
    "first moments": "exp_avg",
    "second moments": "exp_avg_sq",
}
MOST_DIAGNOSED = 3  # steps: each takes every known bug
Params = Mapping[str, Array]


class TracedSteps(NamedTuple):
    """The rows of a trace's training steps, their diagnosis, and notes.

    ``unseen``: results that the steps do not show; ``unjudged``: steps, and results of steps, that
    they show and that cannot be judged; ``judged`` counts the steps of which something was.
    """

    rows: list[Row]
    diagnosis: Diagnosis
    notes: list[str]
    unseen: list[str]
    unjudged: list[str]
    judged: int


def compare_traced_steps(
    trace: TraceFile, checkpoint: Source, start: Start, diagnosing: bool
) -> TracedSteps:
    """Return the rows of all steps whose start is known, and what explains those that diverge."""
    every = range(len(trace.steps))
    if trace.dtype not in ("float32", "float64"):
        note = f"Training steps in {trace.dtype} are not judged: write them in float32 or float64."
        unjudged = [listed("training step", every)]
        return TracedSteps([], Diagnosis([], []), [note], [], unjudged, 0)
    rows: list[Row] = []
    notes: list[str] = []
    diagnosis = Diagnosis([], [])
    advance = start("training steps", len(trace.steps))
    diagnosed = 0
    starts: list[StepStart | None] = []
    empty: list[int] = []
    untried: list[int] = []
    for s in every:
        at = _start_of(trace, checkpoint, s)
        starts.append(at and at._replace(exact={}, low={}, state=None))
        if at is not None:
            task = _task(trace, s, at.state)
            theirs = _their_values(trace, s, at)
            tried = start if diagnosing and diagnosed < MOST_DIAGNOSED else None
            found, more = judge_step(task, trace.dtype, at, theirs, s, tried)
            if more is not None:
                diagnosed += 1
                diagnosis = _joined(diagnosis, more)
            elif diagnosing and any(row.status == "diverges" for row in found):
                untried.append(s)
            rows += found
            empty += [s] if not found else []
            bad = [row for row in found if row.status == "not finite"]
            notes += [f"{row.name} is not finite {row.detail}." for row in bad[:1]]
        advance()
    gaps = _gaps(trace, starts, empty)
    unjudged = [f"{what}{listed('training step', at)}" for what, at, _ in gaps]
    notes += [f"Not judged: {what}{listed('step', at)}: {why}." for what, at, why in gaps]
    notes += [f"The known bugs were not tried on {listed('step', untried)}."] if untried else []
    judged = len(trace.steps) - sum(len(at) for what, at, _ in gaps if not what)
    return TracedSteps(rows, diagnosis, notes, _unseen(trace), unjudged, judged)


def _gaps(
    trace: TraceFile, starts: Sequence[StepStart | None], empty: Sequence[int]
) -> list[tuple[str, list[int], str]]:
    """Return what is not judged, of which steps, and why: "" stands for all of a step.

    ``starts``: those of the steps, None where unknown; ``empty``: steps without a row.
    """
    unknown = [s for s, at in enumerate(starts) if at is None]
    without = [
        s
        for s, at in enumerate(starts)
        if at is not None and not at.updates and s not in empty and _shows_update(trace, s)
    ]
    shown = [s for s in empty if _shows_update(trace, s)]
    nothing = [s for s in empty if s not in shown]
    parameters, moments = (
        f"the trace does not show {what} after the step before, all of them finite"
        for what in ("every parameter", "exp_avg and exp_avg_sq of every parameter")
    )
    found = [
        ("", unknown, parameters),
        ("the updates of ", without, moments),
        ("", shown, moments),
        ("", nothing, "the trace has no result to judge"),
    ]
    return [gap for gap in found if gap[1]]


def _shows_update(trace: TraceFile, s: int) -> bool:
    """Return whether a step shows a result of the optimizer."""
    names = parameter_shapes(trace.config)
    return any(trace.has_step(s, f"{kind}.{name}") for kind in AFTER_UPDATE for name in names)


def _joined(one: Diagnosis, other: Diagnosis) -> Diagnosis:
    """Return the diagnosis of two steps: the same bugs explain the rows of both."""
    explanations: list[Explanation] = list(one.explanations)
    for more in other.explanations:
        names = [[bug.name for bug in bugs] for bugs in more.suspects]
        for index, known in enumerate(explanations):
            if [[bug.name for bug in bugs] for bugs in known.suspects] == names:
                explanations[index] = known._replace(
                    explains=known.explains + more.explains,
                    contradictions=known.contradictions + more.contradictions,
                )
                break
        else:
            explanations.append(more)
    return Diagnosis(explanations, [*one.unexplained, *other.unexplained])


def _task(trace: TraceFile, s: int, state: OptState | None) -> Task:
    """Return step ``s`` as a task of one run; without hyperparameters nothing is clipped."""
    hyper = trace.hyperparameters or Hyperparameters(grad_clip=math.inf)
    limits = {RUN: hyper.grad_clip}
    return Task(trace.config, trace.steps[s].batches, limits, hyper.z_loss, hyper, state)


def _start_of(trace: TraceFile, checkpoint: Source, s: int) -> StepStart | None:
    """Return where step ``s`` starts; None where the trace lacks the parameters before it."""
    if s == 0:
        return StepStart(*exact_and_low_params(checkpoint, trace.dtype), None)
    params = _all_finite(trace, s - 1, "param")
    if params is None:
        return None
    low = {name: value.astype(trace.dtype) for name, value in params.items()}
    exp_avg, exp_avg_sq = (_all_finite(trace, s - 1, kind) for kind in ("exp_avg", "exp_avg_sq"))
    if exp_avg is None or exp_avg_sq is None:
        return StepStart(params, low, None, updates=False)
    return StepStart(params, low, OptState(s, exp_avg, exp_avg_sq))


def _all_finite(trace: TraceFile, s: int, kind: str) -> dict[str, Array] | None:
    """Return a step's results of a kind by parameter in float64; None unless all, and finite."""
    values = _read_all(trace, s, kind)
    if values.keys() != parameter_shapes(trace.config).keys():
        return None
    if not all(np.isfinite(value).all() for value in values.values()):
        return None
    return {name: value.astype(np.float64) for name, value in values.items()}


def _read_all(trace: TraceFile, s: int, kind: str) -> dict[str, Array]:
    """Return a step's results of a kind by parameter, those that the trace has."""
    found = {}
    for name in parameter_shapes(trace.config):
        value = trace.read_step(s, f"{kind}.{name}")
        if value is not None:
            found[name] = value
    return found


def _their_values(trace: TraceFile, s: int, at: StepStart) -> dict[str, Array]:
    """Return a step's results by the names of ``step_values``, those that can be judged."""
    grads = _read_all(trace, s, "grad")
    after, exp_avg, exp_avg_sq = (
        _read_all(trace, s, kind) if at.updates else {} for kind in AFTER_UPDATE
    )
    state = OptState(s + 1, exp_avg, exp_avg_sq)
    loss, norm = (trace.read_step(s, name) for name in ("loss", "grad_norm"))
    values = {f"grad {name}": as_tokens(value.astype(np.float64)) for name, value in grads.items()}
    if loss is not None:
        values["loss"] = as_tokens(loss.astype(np.float64))
    updates = update_values(RUN, math.nan, state, at.low, after)
    if norm is None:
        del updates[f"{RUN} grad_norm"]
    else:
        updates[f"{RUN} grad_norm"] = as_tokens(norm.astype(np.float64))
    return values | {name: value.astype(np.float64) for name, value in updates.items()}


def _unseen(trace: TraceFile) -> list[str]:
    """Return the results that steps do not show: a kind that none shows, and how many of others."""
    unseen, parameters, steps = [], parameter_shapes(trace.config), range(len(trace.steps))
    for title, kind in SHOWN.items():
        is_scalar = kind in STEP_SCALARS
        names = [kind] if is_scalar else [f"{kind}.{name}" for name in parameters]
        total = len(steps) * len(names)
        left = total - sum(trace.has_step(s, name) for s in steps for name in names)
        if left:
            unseen.append(title if left == total else f"{left} of {total} {title}")
    moments = ["first moments", "second moments"]
    return [*unseen[:-2], "moments"] if unseen[-2:] == moments else unseen
