"""Compare a training step: its loss and gradients, and clipping's and AdamW's results.

Whole models are held in memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from reference_np import grad, optim
from reference_np.mutants import Mutant
from reference_np.ops import Array
from reference_np.optim import OptState
from reference_np.tolerances import Errors, errors
from reference_np.training_mutants import TRAINING

from .diagnosis import Diagnosis, greedy_set_cover
from .judging import Reference, Row, error_bound, judge
from .replay import Key
from .source import Source, open_checkpoint
from .training_task import (
    GradientBound,
    Task,
    inherited_bounds,
)
from .trials import Effect, Suspect


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
    gradient_bound: GradientBound = error_bound,
) -> list[Row]:
    """Return a row for each of the step's results ``names``, as all three mappings name them.

    ``gradient_bound`` is that of the loss and the gradients.
    """
    inherited = {}
    if dtype != "float64":
        inherited = inherited_bounds(task, dtype, theirs, exact_values, baseline, gradient_bound)
    rows = []
    for name in names:
        bound = gradient_bound if name.startswith(("loss", "grad ")) else error_bound
        limit = bound(exact_values[name], [baseline[name]], dtype)
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
    trains = any(row.name.startswith(tuple(task.clip_limits)) for row in rows)

    def take(bug: Mutant, params: Mapping[str, Array]) -> dict[str, Array]:
        vjps, rules = bug.apply(grad.REFERENCE_VJPS), bug.apply(optim.REFERENCE_RULES)
        loss_and_grads = gradients(task, params, vjps, rules)
        return step_values(task, params, loss_and_grads, trains, rules)

    return explain_step(
        TRAINING, take, exact_params, low_params, dtype, theirs, exact_values, rows, advance
    )


def explain_step(
    bugs: Sequence[Mutant],
    take: Callable[[Mutant, Mapping[str, Array]], Mapping[str, Array]],
    exact_params: Mapping[str, Array],
    low_params: Mapping[str, Array],
    dtype: str,
    theirs: Mapping[str, Array],
    exact_values: Mapping[str, Array],
    rows: Sequence[Row],
    advance: Callable[[], None],
) -> Diagnosis:
    """Return those of the bugs that explain ``rows``; ``take`` takes the oracle's step with one.

    The rest is as for ``diagnose_step``.
    """
    measured: dict[Key, Row] = {(0, row.name): row for row in rows if row.inherited is not None}
    unexplained = {key for key, row in measured.items() if row.status == "diverges"}
    suspects: list[Suspect] = []
    for bug in bugs:
        wrong = baseline = take(bug, exact_params)
        if low_params is not exact_params:
            baseline = take(bug, low_params)
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
