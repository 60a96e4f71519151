"""Judge the training steps of a trace file, by the bounds of a step that both sides take.

Each step starts from the trace's own state before it, parameters and moments, so that an error is
that step's; the first one starts from the checkpoint. Whole models are held in memory.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from reference_np.naming import parameter_shapes
from reference_np.ops import Array
from reference_np.optim import Hyperparameters, OptState

from .diagnosis import Diagnosis, Explanation
from .judging import Row
from .progress import Start
from .source import Source
from .trace_file import TraceFile
from .training_step import (
    as_tokens,
    compare_step,
    diagnose_step,
    exact_and_low_params,
    gradients,
    step_values,
    update_values,
)
from .training_task import Task

RUN = "step"  # the only run of a traced step, by the names of training_task.quantity_names
# What a step may show, and the kind of its tensors.
SHOWN = {"losses": "loss", "gradients": "grad", "updates": "param", "moments": "exp_avg"}
MOST_DIAGNOSED = 3  # steps: each takes every known bug
Params = Mapping[str, Array]


class TracedSteps(NamedTuple):
    """The rows of a trace's training steps, their diagnosis, notes, and kinds that none shows."""

    rows: list[Row]
    diagnosis: Diagnosis
    notes: list[str]
    unseen: list[str]


class _Start(NamedTuple):
    """Where a step starts: the parameters in float64 and in the precision under test."""

    exact: Params
    low: Params
    state: OptState | None


def compare_traced_steps(
    trace: TraceFile, checkpoint: Source, start: Start, diagnosing: bool
) -> TracedSteps:
    """Return the rows of all steps whose start is known, and what explains those that diverge."""
    if trace.dtype not in ("float32", "float64"):
        note = f"Training steps in {trace.dtype} are not judged: write them in float32 or float64."
        return TracedSteps([], Diagnosis([], []), [note], ["training steps"])
    rows: list[Row] = []
    notes: list[str] = []
    diagnosis = Diagnosis([], [])
    advance = start("training steps", len(trace.steps))
    diagnosed = 0
    for s in range(len(trace.steps)):
        at = _start_of(trace, checkpoint, s)
        if at is None:
            notes.append(
                f"Step {s} is not judged: the trace lacks the parameters, or the moments exp_avg "
                f"and exp_avg_sq, after step {s - 1}."
            )
            advance()
            continue
        task = _task(trace, s, at.state)
        theirs = _their_values(trace, s, at.low)
        found, more = _judge(task, trace.dtype, at, theirs, s, start if diagnosing else None)
        if more is not None and diagnosed < MOST_DIAGNOSED:
            diagnosed += 1
            diagnosis = _joined(diagnosis, more)
        rows += found
        notes += _partial(trace, s)
        bad = [row for row in found if row.status == "not finite"]
        notes += [f"{row.name} is not finite {row.detail}." for row in bad[:1]]
        advance()
    return TracedSteps(rows, diagnosis, notes, _unseen(trace))


def _judge(
    task: Task, dtype: str, at: _Start, theirs: Mapping[str, Array], s: int, start: Start | None
) -> tuple[list[Row], Diagnosis | None]:
    """Return the rows of a step and, with ``start``, the diagnosis of those that diverge."""
    exact = step_values(task, at.exact, gradients(task, at.exact), trains=True)
    baseline = exact
    if dtype != "float64":
        baseline = step_values(task, at.low, gradients(task, at.low), trains=True)
    names = [name for name in exact if name in theirs]
    rows = compare_step(task, dtype, theirs, exact, baseline, names)
    diagnosis = None
    if start is not None and any(row.status == "diverges" for row in rows):
        advance = start("known training bugs", 1)
        diagnosis = diagnose_step(task, dtype, at.exact, at.low, theirs, exact, rows, advance)
        diagnosis = Diagnosis(
            [e._replace(row=_renamed(e.row, s)) for e in diagnosis.explanations],
            [_renamed(row, s) for row in diagnosis.unexplained],
        )
    return [_renamed(row, s) for row in rows], diagnosis


def _renamed(row: Row, s: int) -> Row:
    """Return a row under the name that its tensor has in the trace, but for the update."""
    name = row.name.removeprefix(f"{RUN} ")
    if name.startswith("step "):
        name = f"update {name.removeprefix('step ')}"
    return row._replace(name=f"step {s} {name}")


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


def _start_of(trace: TraceFile, checkpoint: Source, s: int) -> _Start | None:
    """Return where step ``s`` starts; None where the trace does not show the state before it."""
    if s == 0:
        return _Start(*exact_and_low_params(checkpoint, trace.dtype), None)
    found = []
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        values = _read_all(trace, s - 1, kind)
        if values.keys() != parameter_shapes(trace.config).keys():
            return None
        if not all(np.isfinite(value).all() for value in values.values()):
            return None
        found.append({name: value.astype(np.float64) for name, value in values.items()})
    params, exp_avg, exp_avg_sq = found
    low = {name: value.astype(trace.dtype) for name, value in params.items()}
    return _Start(params, low, OptState(s, exp_avg, exp_avg_sq))


def _read_all(trace: TraceFile, s: int, kind: str) -> dict[str, Array]:
    """Return a step's results of a kind by parameter, those that the trace has."""
    found = {}
    for name in parameter_shapes(trace.config):
        value = trace.read_step(s, f"{kind}.{name}")
        if value is not None:
            found[name] = value
    return found


def _their_values(trace: TraceFile, s: int, before: Params) -> dict[str, Array]:
    """Return a step's results by the names of ``step_values``; ``before``: the parameters."""
    grads, after = _read_all(trace, s, "grad"), _read_all(trace, s, "param")
    state = OptState(s + 1, _read_all(trace, s, "exp_avg"), _read_all(trace, s, "exp_avg_sq"))
    loss, norm = (trace.read_step(s, name) for name in ("loss", "grad_norm"))
    values = {f"grad {name}": as_tokens(value.astype(np.float64)) for name, value in grads.items()}
    if loss is not None:
        values["loss"] = as_tokens(loss.astype(np.float64))
    updates = update_values(RUN, math.nan, state, before, after)
    if norm is None:
        del updates[f"{RUN} grad_norm"]
    else:
        updates[f"{RUN} grad_norm"] = as_tokens(norm.astype(np.float64))
    return values | {name: value.astype(np.float64) for name, value in updates.items()}


def _partial(trace: TraceFile, s: int) -> list[str]:
    """Return a note of the kinds that a step shows of some parameters alone."""
    notes = []
    n = len(parameter_shapes(trace.config))
    for kind in ("grad", "param", "exp_avg", "exp_avg_sq"):
        shown = sum(trace.has_step(s, f"{kind}.{name}") for name in parameter_shapes(trace.config))
        if 0 < shown < n:
            notes.append(f"Step {s} shows {kind} of {shown} of {n} parameters.")
    return notes


def _unseen(trace: TraceFile) -> list[str]:
    """Return the kinds of results that no step shows."""
    parameters = parameter_shapes(trace.config)

    def is_shown(kind: str) -> bool:
        names = ["loss"] if kind == "loss" else [f"{kind}.{name}" for name in parameters]
        return any(trace.has_step(s, n) for s in range(len(trace.steps)) for n in names)

    return [title for title, kind in SHOWN.items() if not is_shown(kind)]
