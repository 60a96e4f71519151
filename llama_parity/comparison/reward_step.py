"""Compare a training step of a reward model: scores, loss, gradients and the update.

Whole models are held in memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference_np import grad, optim
from reference_np.checkpoint import RewardCheckpoint
from reference_np.config import LlamaConfig
from reference_np.fine_tuning_mutants import FINE_TUNING
from reference_np.mutants import Mutant
from reference_np.naming import SCORE, parameter_shapes
from reference_np.ops import Array
from reference_np.optim import OptState
from reference_np.reward_model import REFERENCE_LOSSES, RewardStep, loss_and_grads
from reference_np.tolerances import (
    BASELINE_FACTOR,
    FLOAT64_TOLERANCE,
    FLOOR_ROUNDINGS_WORST,
    UNIT_ROUNDOFF,
    Errors,
)
from reference_np.training_mutants import TRAINING

from . import report as reports
from .backend_training import FIRST_ALONE
from .diagnosis import Diagnosis
from .judging import Reference, Row, error_bound, judge
from .progress import Start
from .report_rows import counted
from .reward_pairs import RewardInput, layout_rows
from .training_step import (
    as_tokens,
    compare_step,
    explain_step,
    gradient_values,
    step_values,
    update_values,
)
from .training_task import HYPERPARAMETERS, RUNS, Task, clip_limits, quantity_names
from .verdict import Extent, verdict

Params = Mapping[str, Array]
# The bugs that a step of a reward model can show: of its losses, of the backward pass and of AdamW.
BUGS = (
    *(bug for bug in FINE_TUNING if hasattr(REFERENCE_LOSSES, bug.operation)),
    *(bug for bug in TRAINING if bug.operation not in ("accumulate", "cross_entropy_vjp")),
)


class Oracle(NamedTuple):
    """The oracle's side of the step, in one precision."""

    params: Params
    step: RewardStep
    values: dict[str, Array]  # all results by name


def compare_reward(
    ckpt: str, against: str, dtype: str, given: RewardInput, start: Start, diagnosing: bool
) -> dict[str, Any]:
    """Take the step on both sides; return the report's dictionary.

    against  "torch" or "cuda".
    """
    from .reward_torch import torch_reward

    checkpoint = RewardCheckpoint(ckpt, np.float64)
    config, exact_params = checkpoint.config, dict(checkpoint)
    advance = start("training step", 3)
    step = _gradients(exact_params, config, given)
    task = Task(config, [], clip_limits(step.grads), 0.0)
    exact = low = Oracle(exact_params, step, _values(task, exact_params, step))
    advance()
    if dtype != "float64":
        params = dict(RewardCheckpoint(ckpt, dtype))
        step = _gradients(params, config, given)
        low = Oracle(params, step, _values(task, params, step))
    advance()
    port = torch_reward(Path(ckpt), dtype, "cuda" if against == "cuda" else "cpu", given)
    theirs = _their_values(port, task, low.params)
    advance()
    judged = _judged(task, dtype, theirs, exact, low)
    rows = [*layout_rows(given, port.batches, port.margins()), *judged]
    diagnosis = Diagnosis([], [])
    if diagnosing and any(row.status == "diverges" for row in judged):
        diagnosis = _diagnose(task, dtype, theirs, exact, low, given, judged, start)
    return _report(ckpt, against, dtype, config.n_layers, given, rows, diagnosis)


def _judged(
    task: Task, dtype: str, theirs: Mapping[str, Array], exact: Oracle, low: Oracle
) -> list[Row]:
    """Return rows of scores, loss, gradients and updates."""
    rows = _score_rows(theirs, exact.step, low.step, dtype)
    trunk = parameter_shapes(replace(task.config, tie_embeddings=True))
    names = quantity_names([*trunk, SCORE], trains=True)
    bound = partial(_gradient_bound, _error_of_scores(theirs, exact.step, low.step, dtype))
    return rows + compare_step(task, dtype, theirs, exact.values, low.values, names, bound)


def _diagnose(
    task: Task,
    dtype: str,
    theirs: Mapping[str, Array],
    exact: Oracle,
    low: Oracle,
    given: RewardInput,
    rows: Sequence[Row],
    start: Start,
) -> Diagnosis:
    """Take the oracle's step with each of BUGS; return those that explain the rows."""

    def take(bug: Mutant, params: Params) -> Mapping[str, Array]:
        return _values(task, params, _gradients(params, task.config, given, bug), bug)

    advance = start("known training bugs", len(BUGS))
    both = exact.params, low.params
    return explain_step(BUGS, take, *both, dtype, theirs, exact.values, rows, advance)


def _gradients(
    params: Params, config: LlamaConfig, given: RewardInput, bug: Mutant | None = None
) -> RewardStep:
    """Return the oracle's scores, loss and gradients, with one bug where there is one."""
    vjps, losses = grad.REFERENCE_VJPS, REFERENCE_LOSSES
    if bug is not None:
        vjps, losses = bug.apply(vjps), bug.apply(losses)
    return loss_and_grads(params, given.batches, config, given.safety_weight, vjps, losses)


def _values(
    task: Task, params: Params, step: RewardStep, bug: Mutant | None = None
) -> dict[str, Array]:
    """Return all results of the oracle's step by name."""
    rules = optim.REFERENCE_RULES if bug is None else bug.apply(optim.REFERENCE_RULES)
    updates = step_values(task, params, (step.loss, step.grads), True, rules)
    return {**score_values(step.scores), **updates}


def score_values(scores: Sequence[Array]) -> dict[str, Array]:
    """Return the scores [B] of micro-batches by the names of their rows, each [1, 1, 1]."""
    flat = np.concatenate(scores)
    names = (f"score of pair {i + 1}, {side}" for i in range(len(flat) // 2) for side in SIDES)
    return {name: as_tokens(score) for name, score in zip(names, flat, strict=True)}


SIDES = "chosen", "rejected"


def _their_values(port: Any, task: Task, before: Params) -> dict[str, Array]:
    """Return all results of the other side's step by name."""
    values = {**score_values(port.scores()), **gradient_values(*port.loss_and_grads())}
    for run in RUNS:
        hyper = replace(HYPERPARAMETERS, z_loss=0.0, grad_clip=task.clip_limits[run])
        found = port.train(hyper)
        state = OptState(1, found["exp_avg"], found["exp_avg_sq"])
        values |= update_values(run, found["grad_norm"], state, before, found["params"])
    return values


def _score_rows(
    theirs: Mapping[str, Array], exact: RewardStep, low: RewardStep, dtype: str
) -> list[Row]:
    """Return a row for each conversation's score, judged by one absolute bound."""
    bound, rows = _score_bound(exact, low, dtype), []
    for name, value in score_values(exact.scores).items():
        size = abs(value.item())
        limit = bound / size if size else math.inf
        reference = Reference(value, Errors(limit, limit, limit))
        rows.append(judge((0, name), theirs.get(name), [reference]))
    return rows


def _score_bound(exact: RewardStep, low: RewardStep, dtype: str) -> float:
    """Return the absolute error allowed to a score.

    A score is one number, which the baseline may have right by chance: it is that of the score
    that the baseline errs on most.
    """
    right, baseline = (np.concatenate(step.scores).astype(np.float64) for step in (exact, low))
    largest = float(np.abs(right).max())
    if dtype == "float64":
        return FLOAT64_TOLERANCE * largest
    worst = float(np.abs(baseline - right).max())
    return BASELINE_FACTOR * worst + FLOOR_ROUNDINGS_WORST * UNIT_ROUNDOFF[dtype] * largest


def _error_of_scores(
    theirs: Mapping[str, Array], exact: RewardStep, low: RewardStep, dtype: str
) -> float:
    """Return the relative error that loss and gradients inherit from the scores, up to its bound.

    An error d of a pair's gap, or of a score, changes -log sigmoid of it and its derivative by no
    more than d of themselves.
    """
    if dtype == "float64":
        return 0.0
    found = score_values(exact.scores)
    wrong_B = np.array([float(theirs[name].item() - value.item()) for name, value in found.items()])
    largest = max(np.abs(wrong_B).max(), np.abs(wrong_B[::2] - wrong_B[1::2]).max())
    return min(float(largest), 2 * _score_bound(exact, low, dtype))


def _gradient_bound(
    of_scores: float, exact: Array, baselines: Sequence[Array], dtype: str
) -> Errors:
    """Return the error allowed to the loss, or a gradient [1, R, C] with that of the scores.

    Few tokens have a gradient to begin with, so that one row of a matrix may be what other rows'
    sizes have cancelled to, and the baseline right there by chance: the smallest row may err as
    the others do.
    """
    limit = Errors(*(of_scores + part for part in error_bound(exact, baselines, dtype)))
    rows = np.sqrt(np.mean(exact * exact, axis=-1))
    if dtype == "float64" or not rows.any():
        return limit
    whole = math.sqrt(float(np.mean(rows * rows)))
    return limit._replace(token=max(limit.token, 2 * limit.rms * whole / rows[rows > 0].min()))


def _report(
    ckpt: str,
    against: str,
    dtype: str,
    n_layers: int,
    given: RewardInput,
    rows: Sequence[Row],
    diagnosis: Diagnosis,
) -> dict[str, Any]:
    """Return the report's dictionary, of a training step alone."""
    nothing = Diagnosis([], [])
    where = " on the GPU" if against == "cuda" else ""
    step = f"a training step on {counted(given.n_pairs, 'pair')}"
    return {
        "schema": reports.SCHEMA,
        "title": f"{ckpt}: oracle against torch{where}, the same weights, {dtype}, {step}",
        "checkpoint": ckpt,
        "against": against,
        "dtype": dtype,
        "n_layers": n_layers,
        "layers": [0, n_layers],
        "calls": [],
        "coverage": [],
        "verdict": verdict(rows, len(rows), [], Extent("quantities", [FIRST_ALONE])),
        "rows": [],
        "first_divergence": None,
        **reports.diagnosis_entries(nothing, [], []),
        "logits": [],
        "logprobs": [],
        "engines": None,
        "heatmap": None,
        "training": {
            "rows": [reports.row_entry(row) for row in rows],
            "notes": [given.note],
            **reports.diagnosis_entries(diagnosis, rows, []),
        },
        "warnings": "",
    }
