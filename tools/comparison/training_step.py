"""A training step on both sides: loss, gradients, and what clipping and AdamW make of them.

Two micro-batches with unequal numbers of targets share one step; it is taken once with a limit
that clips and once with one that does not. Whole models are held in memory here.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference_np import backend as backends
from reference_np import grad, optim
from reference_np.checkpoint import Checkpoint
from reference_np.config import InputError
from reference_np.grad import Batch
from reference_np.ops import Array
from reference_np.tolerances import Errors, errors
from reference_np.training_mutants import TRAINING

from .backend_side import Parameters, ask
from .diagnosis import Diagnosis, Start, cover
from .judging import Judged, Row, bound, judge
from .replay import Key
from .sides import Side
from .training_task import RUNS, STEP, Task, clips, names, slack
from .trials import Effect, Suspect


def gradients(
    task: Task,
    params: Mapping[str, Array],
    vjps: SimpleNamespace = grad.REFERENCE,
    rules: SimpleNamespace = optim.REFERENCE,
) -> tuple[float, Mapping[str, Array]]:
    """Return the oracle's loss and gradients, in the dtype of the parameters."""
    hyper = replace(STEP, z_loss=task.z_loss)
    found: tuple[float, Mapping[str, Array]] = rules.accumulate(
        params, task.batches, task.config, hyper, vjps
    )
    return found


def step_values(
    task: Task,
    params: Mapping[str, Array],
    made: tuple[float, Mapping[str, Array]],
    trains: bool,
    rules: SimpleNamespace = optim.REFERENCE,
) -> dict[str, Array]:
    """Return all that the oracle's step leaves, given its loss and gradients."""
    found = _first(*made)
    given = SimpleNamespace(**{**vars(rules), "accumulate": lambda *_: made})
    for run in RUNS if trains else ():
        hyper = replace(STEP, z_loss=task.z_loss, grad_clip=task.clips[run])
        new, state, metrics = optim.train_step(
            params, optim.init_state(params), task.batches, task.config, hyper, rules=given
        )
        found |= _second(run, metrics.grad_norm, state.exp_avg, params, new)
    return found


def compare_training(
    side: Side, checkpoint: Checkpoint, batches: list[Batch], start: Start, diagnosing: bool
) -> tuple[list[Row], Diagnosis, list[str]]:
    """Take a training step on both sides; return its rows, their diagnosis, and notes.

    Raises InputError for a backend without gradients, and for one that fails.
    """
    exact = dict(checkpoint)  # float64
    low = exact if side.dtype == "float64" else dict(Checkpoint(checkpoint.path, side.dtype))
    advance = start("training step", 3)
    step = _their_step(side, checkpoint, batches, exact)
    task, theirs, trains = step.task, step.values, step.trains
    advance()
    right = step_values(task, exact, step.made, trains)
    advance()
    plain = right if low is exact else step_values(task, low, gradients(task, low), trains)
    advance()
    rows = compare_step(task, side.dtype, theirs, right, plain, trains)
    found = Diagnosis([], [])
    if diagnosing and any(row.status == "diverges" for row in rows):
        advance = start("known training bugs", len(TRAINING))
        found = diagnose_step(task, side.dtype, exact, low, theirs, right, rows, advance)
    return rows, found, step.notes


class TheirStep(NamedTuple):
    """The other side's training step, and what of it is compared."""

    task: Task  # without z-loss where that is not offered
    made: Any  # the oracle's gradients, which decide where norms are clipped
    values: dict[str, Array]
    trains: bool  # whether there is more than gradients
    notes: list[str]


def _their_step(
    side: Side, checkpoint: Checkpoint, batches: list[Batch], exact: Mapping[str, Array]
) -> TheirStep:
    """Ask the other side for its gradients and its step, and leave out what it does not offer."""
    backend, config = backends.load(side.backend, "--against"), checkpoint.config
    theirs_at = checkpoint.path if side.weights is None else side.weights
    given = Parameters(Checkpoint(theirs_at, side.dtype), config, side.dtype)
    notes: list[str] = []

    def theirs_of(name: str, *arguments: Any) -> Any:
        own_batches = copy.deepcopy(batches)
        return ask(backend, name, "the training step", config, given, own_batches, *arguments)

    task = Task(config, batches, {}, STEP.z_loss)
    try:
        first = theirs_of("loss_and_grads", task.z_loss)
    except NotImplementedError as error:
        notes.append(f"z-loss is left out ({error})")
        task = task._replace(z_loss=0.0)
        try:
            first = theirs_of("loss_and_grads", 0.0)
        except NotImplementedError as other:
            raise InputError(f"--grads: {side.title} does not offer it ({other})") from None
    made = gradients(task, exact)
    task = task._replace(clips=clips(made[1]))
    try:
        done = {}
        for run in RUNS:
            hyper = replace(STEP, z_loss=task.z_loss, grad_clip=task.clips[run])
            done[run] = theirs_of("train", hyper, 1)
    except NotImplementedError as error:
        notes.append(f"gradients alone, no step ({error})")
        done = {}
    return TheirStep(task, made, _values(first, done, given), bool(done), notes)


def _values(first: Any, done: Mapping[str, Any], given: Mapping[str, Array]) -> dict[str, Array]:
    """Return the values of gradients and steps by the names of ``names``."""
    try:
        values = _first(*first)
        for run, found in done.items():
            values |= _second(run, found["grad_norm"][0], found["exp_avg"], given, found["params"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"--against: loss_and_grads or train returned something else than the protocol says "
            f"({type(error).__name__}: {error}); see reference_np/backend.py"
        ) from None
    return values


def _rows(value: Any) -> Array:
    """Give matrices as [1, rows, columns], so that a wrong row shows."""
    array = np.asarray(value)
    return array.reshape((1, *array.shape) if array.ndim == 2 else (1, 1, -1))


def _first(loss: float, grads: Mapping[str, Any]) -> dict[str, Array]:
    return {"loss": _rows(loss), **{f"grad {name}": _rows(g) for name, g in grads.items()}}


def _second(
    run: str,
    norm: float,
    exp_avg: Mapping[str, Any],
    before: Mapping[str, Array],
    after: Mapping[str, Any],
) -> dict[str, Array]:
    # The change, in float64: beside the parameter itself it would vanish.
    steps = {n: np.asarray(after[n], np.float64) - before[n] for n in before if n in after}
    return {
        f"{run} grad_norm": _rows(norm),
        **{f"{run} exp_avg {name}": _rows(value) for name, value in exp_avg.items()},
        **{f"{run} step {name}": _rows(value) for name, value in steps.items()},
    }


def compare_step(
    task: Task,
    dtype: str,
    theirs: Mapping[str, Array],
    exact: Mapping[str, Array],
    plain: Mapping[str, Array],
    trains: bool,
) -> list[Row]:
    """Return a row for every expected quantity; a missing one does not hold."""
    more = {} if dtype == "float64" else slack(task, dtype, theirs, exact, plain)
    found = []
    for name in names(task.config, trains):
        limit = bound(exact[name], [plain[name]], dtype)
        if name in more:
            limit = Errors(*(a + b for a, b in zip(limit, more[name], strict=True)))
        row = judge((0, name), theirs.get(name), [Judged(exact[name], limit)])
        found.append(row)
    return found


def diagnose_step(
    task: Task,
    dtype: str,
    exact: Mapping[str, Array],
    low: Mapping[str, Array],
    theirs: Mapping[str, Array],
    right: Mapping[str, Array],
    rows: Sequence[Row],
    advance: Callable[[], None],
) -> Diagnosis:
    """Take the oracle's step with each known training bug; say which gives what they got."""
    judged: dict[Key, Row] = {(0, row.name): row for row in rows if row.inherited is not None}
    left = {key for key, row in judged.items() if row.status == "diverges"}
    trains = any(row.name.startswith(RUNS) for row in rows)
    suspects: list[Suspect] = []
    for bug in TRAINING:
        vjps, rules = bug.apply(grad.REFERENCE), bug.apply(optim.REFERENCE)
        made = plain = step_values(task, exact, gradients(task, exact, vjps, rules), trains, rules)
        if low is not exact:
            plain = step_values(task, low, gradients(task, low, vjps, rules), trains, rules)
        found = {}
        for key, row in judged.items():
            assert row.inherited is not None
            # What the bug makes may be worse conditioned than what is right.
            limit = bound(made[row.name], [plain[row.name]], dtype)
            limit = Errors(*map(max, limit, row.inherited.bound))
            error = errors(theirs[row.name], made[row.name])
            moves = not np.array_equal(made[row.name], right[row.name])
            found[key] = Effect(error.within(limit), error.rms, math.inf, moves)
        suspects.append(((bug,), found))
        advance()
    findings = cover(judged, suspects, left)
    return Diagnosis(findings, [judged[key] for key in judged if key in left])
