"""Compare a training step: its loss and gradients, and clipping's and AdamW's results.

Two micro-batches with unequal numbers of targets share one step; it is taken once with a limit
that clips and once with one that does not. Whole models are held in memory.
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
from reference_np.config import InputError
from reference_np.grad import Batch
from reference_np.ops import Array
from reference_np.optim import OptState
from reference_np.tolerances import Errors, errors
from reference_np.training_mutants import TRAINING

from .backend_side import BackendParams
from .diagnosis import Diagnosis, greedy_set_cover
from .engine_side import call_backend
from .judging import Reference, Row, error_bound, judge
from .progress import Start
from .replay import Key
from .sides import Side
from .source import Source, open_checkpoint
from .training_task import (
    HYPERPARAMETERS,
    RUNS,
    Task,
    clip_limits,
    inherited_bounds,
    quantity_names,
)
from .trials import Effect, Suspect
from .within_limits import config_within


def gradients(
    task: Task,
    params: Mapping[str, Array],
    vjps: SimpleNamespace = grad.REFERENCE_VJPS,
    rules: SimpleNamespace = optim.REFERENCE_RULES,
) -> tuple[float, Mapping[str, Array]]:
    """Return the oracle's loss and its gradients by name, in the dtype of the parameters.

    ``vjps``: the backward operations; ``rules``: the steps of training.
    """
    loss_and_grads: tuple[float, Mapping[str, Array]] = rules.accumulate(
        params, task.batches, task.config, task.z_loss, vjps
    )
    return loss_and_grads


def with_gradients(
    loss_and_grads: tuple[float, Mapping[str, Array]],
    rules: SimpleNamespace = optim.REFERENCE_RULES,
) -> SimpleNamespace:
    """Return the steps of training with a loss and gradients that are known already."""
    return SimpleNamespace(**{**vars(rules), "accumulate": lambda *_: loss_and_grads})


def exact_and_low_params(
    checkpoint: Source, dtype: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return all parameters in float64 and in ``dtype``; the same ones where that is float64."""
    exact = dict(checkpoint)
    return exact, exact if dtype == "float64" else dict(open_checkpoint(checkpoint.path, dtype))


def step_values(
    task: Task,
    params: Mapping[str, Array],
    loss_and_grads: tuple[float, Mapping[str, Array]],
    trains: bool,
    rules: SimpleNamespace = optim.REFERENCE_RULES,
) -> dict[str, Array]:
    """Return all results of the oracle's step by name, given its loss and gradients.

    ``trains``: with the optimizer's. Matrices are [1, rows, columns], all others [1, 1, n].
    """
    values = gradient_values(*loss_and_grads)
    given = with_gradients(loss_and_grads, rules)
    for run in task.clip_limits if trains else ():
        hyper = replace(task.hyper, z_loss=task.z_loss, grad_clip=task.clip_limits[run])
        new, state, metrics = optim.train_step(
            params, task.state_like(params), task.batches, task.config, hyper, rules=given
        )
        values |= update_values(run, metrics.grad_norm, state, params, new)
    return values


def compare_training(
    side: Side, checkpoint: Source, batches: list[Batch], start: Start, diagnosing: bool
) -> tuple[list[Row], Diagnosis, list[str]]:
    """Take a training step on both sides; return its rows, their diagnosis, and notes to print.

    Raises InputError for a backend without gradients, and for one that fails.
    """
    exact_params, low_params = exact_and_low_params(checkpoint, side.dtype)
    advance = start("training step", 3)
    step = _their_step(side, checkpoint, batches, exact_params)
    task, trains = step.task, step.trains
    advance()
    exact_values = step_values(task, exact_params, step.exact_gradients, trains)
    advance()
    baseline = exact_values
    if low_params is not exact_params:
        baseline = step_values(task, low_params, gradients(task, low_params), trains)
    advance()
    names = quantity_names(task.config, trains)
    rows = compare_step(task, side.dtype, step.values, exact_values, baseline, names)
    diagnosis = Diagnosis([], [])
    if diagnosing and any(row.status == "diverges" for row in rows):
        advance = start("known training bugs", len(TRAINING))
        diagnosis = diagnose_step(
            task, side.dtype, exact_params, low_params, step.values, exact_values, rows, advance
        )
    return rows, diagnosis, step.notes


class TheirStep(NamedTuple):
    """The other side's training step, and the part of it that is compared."""

    task: Task  # without z-loss where that is not offered
    exact_gradients: Any  # the oracle's loss and gradients, which decide where norms are clipped
    values: dict[str, Array]
    trains: bool  # whether there is more than gradients
    notes: list[str]


def _their_step(
    side: Side, checkpoint: Source, batches: list[Batch], exact_params: Mapping[str, Array]
) -> TheirStep:
    """Take the other side's step, as much of it as its backend offers.

    Raises InputError for a backend without gradients, and for one that fails.
    """
    backend = backends.load(side.backend, "--against")
    config = config_within(side.limits, checkpoint.config)
    path = checkpoint.path if side.weights is None else side.weights
    params = BackendParams(open_checkpoint(path, side.dtype), config, side.dtype)
    notes: list[str] = []

    def call(name: str, *arguments: Any) -> Any:
        given = (config, params, copy.deepcopy(batches), *arguments)
        return call_backend(backend, name, "the training step", *given)

    task = Task(config, batches, {}, HYPERPARAMETERS.z_loss)
    try:
        loss_and_grads = call("loss_and_grads", task.z_loss)
    except NotImplementedError as error:
        notes.append(f"z-loss is left out ({error})")
        task = task._replace(z_loss=0.0)
        try:
            loss_and_grads = call("loss_and_grads", 0.0)
        except NotImplementedError as other:
            raise InputError(f"--grads: {side.title} does not offer it ({other})") from None
    exact_gradients = gradients(task, exact_params)
    task = task._replace(clip_limits=clip_limits(exact_gradients[1]))
    try:
        steps = {}
        for run in RUNS:
            hyper = replace(HYPERPARAMETERS, z_loss=task.z_loss, grad_clip=task.clip_limits[run])
            steps[run] = call("train", hyper, 1)
    except NotImplementedError as error:
        notes.append(f"gradients alone, no step ({error})")
        steps = {}
    values = _their_values(loss_and_grads, steps, params)
    return TheirStep(task, exact_gradients, values, bool(steps), notes)


def _their_values(
    loss_and_grads: Any, steps: Mapping[str, Any], before: Mapping[str, Array]
) -> dict[str, Array]:
    """Return gradients and steps by the names of ``quantity_names``.

    ``before``: the parameters before the step. Raises InputError for results of another form.
    """
    try:
        values = gradient_values(*loss_and_grads)
        for run, step in steps.items():
            norm, exp_avg, after = step["grad_norm"][0], step["exp_avg"], step["params"]
            values |= update_values(run, norm, OptState(1, exp_avg, {}), before, after)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"--against: loss_and_grads or train returned something else than the protocol says "
            f"({type(error).__name__}: {error}); see reference_np/backend.py"
        ) from None
    return values


def as_tokens(value: Any) -> Array:
    """Return a matrix as [1, rows, columns], its rows in place of tokens; all else as [1, 1, n]."""
    array = np.asarray(value)
    return array.reshape((1, *array.shape) if array.ndim == 2 else (1, 1, -1))


def gradient_values(loss: float, grads: Mapping[str, Any]) -> dict[str, Array]:
    """Return the loss and gradients by the names of ``quantity_names``."""
    return {"loss": as_tokens(loss), **{f"grad {n}": as_tokens(g) for n, g in grads.items()}}


def update_values(
    run: str,
    norm: float,
    state: OptState,
    before: Mapping[str, Array],
    after: Mapping[str, Any],
) -> dict[str, Array]:
    """Return an update's results by name, given the optimizer's state and parameters after it."""
    # The update in float64: beside the parameter itself its error would vanish.
    steps = {n: np.asarray(after[n], np.float64) - before[n] for n in before if n in after}
    return {
        f"{run} grad_norm": as_tokens(norm),
        **{f"{run} exp_avg {name}": as_tokens(x) for name, x in state.exp_avg.items()},
        **{f"{run} exp_avg_sq {name}": as_tokens(x) for name, x in state.exp_avg_sq.items()},
        **{f"{run} step {name}": as_tokens(value) for name, value in steps.items()},
    }


def compare_step(
    task: Task,
    dtype: str,
    theirs: Mapping[str, Array],
    exact_values: Mapping[str, Array],
    baseline: Mapping[str, Array],
    names: Sequence[str],
) -> list[Row]:
    """Return a row for each of the step's results ``names``, as all three mappings name them."""
    inherited = {}
    if dtype != "float64":
        inherited = inherited_bounds(task, dtype, theirs, exact_values, baseline)
    rows = []
    for name in names:
        limit = error_bound(exact_values[name], [baseline[name]], dtype)
        if name in inherited:
            limit = Errors(*(a + b for a, b in zip(limit, inherited[name], strict=True)))
        rows.append(judge((0, name), theirs.get(name), [Reference(exact_values[name], limit)]))
    return rows


def diagnose_step(
    task: Task,
    dtype: str,
    exact_params: Mapping[str, Array],
    low_params: Mapping[str, Array],
    theirs: Mapping[str, Array],
    exact_values: Mapping[str, Array],
    rows: Sequence[Row],
    advance: Callable[[], None],
) -> Diagnosis:
    """Take the oracle's step with each known training bug; return the bugs that explain ``rows``.

    ``exact_params``, ``low_params``: the parameters in float64 and in the precision under test.
    ``theirs``, ``exact_values``: the results of the other side's step and of the oracle's.
    """
    measured: dict[Key, Row] = {(0, row.name): row for row in rows if row.inherited is not None}
    unexplained = {key for key, row in measured.items() if row.status == "diverges"}
    trains = any(row.name.startswith(tuple(task.clip_limits)) for row in rows)
    suspects: list[Suspect] = []
    for bug in TRAINING:
        vjps, rules = bug.apply(grad.REFERENCE_VJPS), bug.apply(optim.REFERENCE_RULES)
        loss_and_grads = gradients(task, exact_params, vjps, rules)
        wrong = step_values(task, exact_params, loss_and_grads, trains, rules)
        baseline = wrong
        if low_params is not exact_params:
            loss_and_grads = gradients(task, low_params, vjps, rules)
            baseline = step_values(task, low_params, loss_and_grads, trains, rules)
        effects = {}
        for key, row in measured.items():
            assert row.inherited is not None
            # A result of the bug may be worse conditioned than the right one.
            limit = error_bound(wrong[row.name], [baseline[row.name]], dtype)
            limit = Errors(*map(max, limit, row.inherited.bound))
            error = errors(theirs[row.name], wrong[row.name])
            changes = not np.array_equal(wrong[row.name], exact_values[row.name])
            effects[key] = Effect(error.within(limit), error.rms, math.inf, changes)
        suspects.append(((bug,), effects))
        advance()
    explanations = greedy_set_cover(measured, suspects, unexplained)
    return Diagnosis(explanations, [measured[key] for key in measured if key in unexplained])
