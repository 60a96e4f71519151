"""A training step on both sides: loss, gradients, and what clipping and AdamW make of them.

Two micro-batches with unequal numbers of targets share one step; it is taken once with a limit
that clips and once with one that does not. Whole models are held in memory here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference_np import grad, optim
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import parameter_shapes
from reference_np.ops import IGNORE, Array
from reference_np.tolerances import LAMBDA, UNIT_ROUNDOFF, Errors, composed_bound, errors
from reference_np.training_mutants import TRAINING

from .diagnosis import Diagnosis, Effect, Suspect, cover
from .differences import Measure, Row, judge
from .replay import Key

# The paper's settings at the peak of the schedule, where a step is largest; z-loss as in PaLM.
STEP = optim.Hyper(warmup_steps=0, z_loss=1e-4)
RUNS = ("clipped", "whole")  # under a limit that some single tensor exceeds, and one above all


def clips(grads: Mapping[str, Array]) -> dict[str, float]:
    """Return each run's limit, given every gradient."""
    norm = optim.global_norm(grads)
    # Of n tensors one has at least 1 / sqrt(n) of the whole norm.
    return {"clipped": norm / (2 * math.sqrt(len(grads))), "whole": 2 * norm}


class Task(NamedTuple):
    """One step to take."""

    config: LlamaConfig
    batches: Sequence[Batch]
    clips: Mapping[str, float]
    z_loss: float


def make_batches(ids: Array) -> list[Batch]:
    """Cut token ids into two micro-batches of unequal length; the second ignores some targets."""
    if len(ids) < 8:
        raise InputError("--grads needs 8 tokens or more, for two micro-batches")
    cut = 3 * len(ids) // 4
    parts = [ids[None, :cut], ids[None, cut - 1 :]]
    batches = [Batch(part[:, :-1], part[:, 1:].copy()) for part in parts]
    batches[0].targets[:, ::3] = IGNORE
    return batches


def names(config: LlamaConfig, trains: bool) -> list[str]:
    """Return what a step leaves, in the order it is made."""
    parameters = list(parameter_shapes(config))
    found = ["loss", *(f"grad {name}" for name in parameters)]
    for run in RUNS if trains else ():
        found.append(f"{run} grad_norm")
        found += [f"{run} {kind} {name}" for kind in ("exp_avg", "step") for name in parameters]
    return found


def oracle_values(
    task: Task,
    params: Mapping[str, Array],
    trains: bool,
    vjps: SimpleNamespace = grad.REFERENCE,
    rules: SimpleNamespace = optim.REFERENCE,
) -> dict[str, Array]:
    """Take the step in NumPy, in the dtype of the parameters."""
    hyper = replace(STEP, z_loss=task.z_loss)
    loss, grads = rules.accumulate(params, task.batches, task.config, hyper, vjps)
    found = _first(loss, grads)
    # The gradients are the same for both limits, and they are most of the work.
    once = SimpleNamespace(**{**vars(rules), "accumulate": lambda *_: (loss, grads)})
    for run in RUNS if trains else ():
        new, state, metrics = optim.train_step(
            params,
            optim.init_state(params),
            task.batches,
            task.config,
            replace(hyper, grad_clip=task.clips[run]),
            rules=once,
        )
        found |= _second(run, metrics.grad_norm, state.exp_avg, params, new)
    return found


def their_values(
    backend: Any, task: Task, params: Mapping[str, Array], trains: bool
) -> dict[str, Array]:
    """Have a backend take the step. Raises NotImplementedError for what it does not offer."""
    hyper = replace(STEP, z_loss=task.z_loss)
    loss, grads = backend.loss_and_grads(task.config, params, task.batches, task.z_loss)
    found = _first(loss, grads)
    for run in RUNS if trains else ():
        done = backend.train(
            task.config, params, task.batches, replace(hyper, grad_clip=task.clips[run]), 1
        )
        found |= _second(run, done["grad_norm"][0], done["exp_avg"], params, done["params"])
    return found


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


def slack(
    task: Task,
    dtype: str,
    theirs: Mapping[str, Array],
    exact: Mapping[str, Array],
    plain: Mapping[str, Array],
) -> dict[str, Errors]:
    """Return what a step's bounds inherit from errors that have rows of their own.

    The gradient norm is one sum over all parameters in the dtype under test; the oracle sums
    it in float64, so that its float32 run says nothing of that error. Clipping hands on what
    there was of it, up to its bound. What a gradient may be off, AdamW's first step inherits.
    """
    found: dict[str, Errors] = {}
    shapes = parameter_shapes(task.config)
    summed = LAMBDA * math.sqrt(sum(map(math.prod, shapes.values()))) * UNIT_ROUNDOFF[dtype]
    for run in RUNS:
        norm_name = f"{run} grad_norm"
        if norm_name not in exact:
            continue
        norm = float(exact[norm_name].item())
        factor = min(1.0, task.clips[run] / norm)
        handed_on = 0.0
        if factor < 1.0:
            handed_on = summed
            if norm_name in theirs:
                handed_on = min(summed, errors(theirs[norm_name], exact[norm_name]).worst)
        found[norm_name] = Errors(summed, summed, summed)
        for name in shapes:
            gradient, step = exact[f"grad {name}"], exact[f"{run} step {name}"]
            limit = composed_bound(errors(plain[f"grad {name}"], gradient), dtype)
            grown = through_adam(limit, np.abs(gradient) * factor, np.abs(step) / STEP.lr)
            found[f"{run} step {name}"] = Errors(*(handed_on + part for part in grown))
            found[f"{run} exp_avg {name}"] = Errors(*[handed_on] * 3)
    return found


def through_adam(limit: Errors, gradient: Array, step: Array) -> Errors:
    """Return what an error of ``limit`` in a gradient [1, R, C] can make of the first step.

    The step is g / (|g| + eps): a change d of g moves it by at most d eps / (|g| - d + eps)^2,
    which is little for a large gradient and d / eps for one that vanishes.
    """

    def moved(d: Any) -> Array:
        moved: Array = d * STEP.eps / (np.maximum(gradient - d, 0.0) + STEP.eps) ** 2
        return moved

    def rms(x: Array, axis: int | None = None) -> Array:
        return np.sqrt(np.mean(x * x, axis=axis, keepdims=True))

    def ratio(error: Array, size: Array) -> float:
        return float(np.max(np.divide(error, size, out=np.zeros_like(error), where=size > 0)))

    return Errors(
        rms=ratio(rms(moved(limit.rms * rms(gradient))), rms(step)),
        worst=ratio(
            moved(limit.worst * gradient.max()).max(keepdims=True), step.max(keepdims=True)
        ),
        token=ratio(rms(moved(limit.token * rms(gradient, -1)), -1), rms(step, -1)),
    )


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
        row = judge((0, name), theirs.get(name), [(exact[name], plain[name])], dtype)
        if row.inherited is not None and name in more:
            wider = Errors(*(a + b for a, b in zip(row.inherited.bound, more[name], strict=True)))
            measure = Measure(row.inherited.error, wider)
            row = row._replace(status="ok" if measure.holds else "diverges", inherited=measure)
        found.append(row)
    return found


def diagnose_step(
    task: Task,
    params: Mapping[str, Array],
    theirs: Mapping[str, Array],
    rows: Sequence[Row],
    trains: bool,
    advance: Callable[[], None],
) -> Diagnosis:
    """Take the oracle's step with each known training bug; say which gives what they got."""
    judged: dict[Key, Row] = {(0, row.name): row for row in rows if row.inherited is not None}
    failing = {key for key, row in judged.items() if row.status == "diverges"}
    if not failing:
        return Diagnosis([], [], 0)
    suspects: list[Suspect] = []
    for bug in TRAINING:
        parts = bug.apply(grad.REFERENCE), bug.apply(optim.REFERENCE)
        with np.errstate(all="ignore"):
            values = oracle_values(task, params, trains, *parts)
            found = {}
            for key, row in judged.items():
                assert row.inherited is not None
                error = errors(theirs[row.name], values[row.name])
                found[key] = Effect(error.within(row.inherited.bound), error.rms, math.inf, True)
        suspects.append(((bug,), found))
        advance()
    left = set(failing)
    findings = cover(judged, suspects, left)
    return Diagnosis(findings, [judged[k] for k in judged if k in left], len(failing))
