"""The training step that both sides take, and how far apart its results may be."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from reference_np import optim
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import parameter_shapes
from reference_np.ops import IGNORE, Array
from reference_np.tolerances import LAMBDA, UNIT_ROUNDOFF, Errors, errors

from .judging import bound

# The paper's settings at the peak of the schedule, where a step is largest; z-loss as in PaLM.
STEP = optim.Hyperparameters(warmup_steps=0, z_loss=1e-4)

RUNS = ("clipped", "whole")  # under a limit that some single tensor exceeds, and one above all


def clips(grads: Mapping[str, Array]) -> dict[str, float]:
    """Return each run's limit, given every gradient."""
    norm = optim.global_norm(grads) or 1.0
    # Of n tensors one has at least 1 / sqrt(n) of the whole norm.
    return {"clipped": norm / (2 * math.sqrt(len(grads))), "whole": 2 * norm}


class Task(NamedTuple):
    """One step to take."""

    config: LlamaConfig
    batches: Sequence[Batch]
    clips: Mapping[str, float]
    z_loss: float


def make_batches(ids: Array) -> list[Batch]:
    """Cut token ids into two micro-batches of unequal length; the first ignores some targets.

    Raises InputError for too few.
    """
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
        factor = min(1.0, task.clips[run] / norm) if norm > 0 else 1.0
        handed_on = 0.0
        if factor < 1.0:
            handed_on = summed
            if norm_name in theirs:
                handed_on = min(summed, errors(theirs[norm_name], exact[norm_name]).worst)
        found[norm_name] = Errors(summed, summed, summed)
        for name in shapes:
            gradient, step = exact[f"grad {name}"], exact[f"{run} step {name}"]
            limit = bound(gradient, [plain[f"grad {name}"]], dtype)
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
        moved: Array = d * STEP.adam_eps / (np.maximum(gradient - d, 0.0) + STEP.adam_eps) ** 2
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
