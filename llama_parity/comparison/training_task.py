"""Define the training step that both sides take, and the errors that its results inherit."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reference_np import optim
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.ops import IGNORE, Array
from reference_np.tolerances import LAMBDA, UNIT_ROUNDOFF, Errors, errors

from .judging import error_bound

# The paper's settings at the peak of the schedule, where a step is largest; z-loss as in PaLM.
HYPERPARAMETERS = optim.Hyperparameters(warmup_steps=0, z_loss=1e-4)

# For the steps after one another, which see what a first step at the peak hides: beta2, the moments
# of several gradients, and the schedule. Half the rate, the peak twice, 0.775 of it, where neither
# a straight line nor a decay that ends elsewhere has the same.
SCHEDULE = replace(HYPERPARAMETERS, warmup_steps=2, steps=6)
N_STEPS = 4

# The first step is taken twice: with a limit on the gradient norm that some single tensor exceeds,
# and with one above the norm of all.
RUNS = ("clipped", "whole")
KINDS = ("exp_avg", "exp_avg_sq", "step")  # what a step shows of each parameter; "step": the update

# The exact gradient, baselines, a dtype -> the error allowed to an implementation.
GradientBound = Callable[[Array, Sequence[Array], str], Errors]


def clip_limits(grads: Mapping[str, Array]) -> dict[str, float]:
    """Return each run's limit on the gradient norm, given all gradients."""
    norm = optim.global_norm(grads)
    norm = norm if 0 < norm < math.inf else 1.0
    # Of n tensors one has at least 1 / sqrt(n) of the whole norm.
    return {"clipped": norm / (2 * math.sqrt(len(grads))), "whole": 2 * norm}


class Task(NamedTuple):
    """A training step: the model's config, micro-batches, each run's clipping limit, z-loss."""

    config: LlamaConfig
    batches: Sequence[Batch]
    clip_limits: Mapping[str, float]
    z_loss: float
    hyper: optim.Hyperparameters = HYPERPARAMETERS  # but for clipping and z-loss
    state: optim.OptState | None = None  # the optimizer's before the step; None: no steps taken

    def state_like(self, params: Mapping[str, Array]) -> optim.OptState:
        """Return the optimizer's state before the step, in the dtype of the parameters."""
        if self.state is None:
            return optim.init_state(params)
        moments = (
            {name: moment[name].astype(p.dtype) for name, p in params.items()}
            for moment in self.state[1:]
        )
        return optim.OptState(self.state.step, *moments)


def make_batches(ids: Array) -> list[Batch]:
    """Cut token ids [n] into two micro-batches of unequal length; the first ignores some targets.

    Raises InputError for fewer than 8 ids.
    """
    if len(ids) < 8:
        raise InputError("--grads needs 8 tokens or more, for two micro-batches")
    cut = 3 * len(ids) // 4
    parts = [ids[None, :cut], ids[None, cut - 1 :]]
    batches = [Batch(part[:, :-1], part[:, 1:].copy()) for part in parts]
    batches[0].targets[:, ::3] = IGNORE
    return batches


def quantity_names(parameters: Sequence[str], trains: bool) -> list[str]:
    """Return the names of a step's results in order; ``trains``: with the optimizer's."""
    names = ["loss", *(f"grad {name}" for name in parameters)]
    for run in RUNS if trains else ():
        names.append(f"{run} grad_norm")
        names += [f"{run} {kind} {name}" for kind in KINDS for name in parameters]
    return names


def inherited_bounds(
    task: Task,
    dtype: str,
    theirs: Mapping[str, Array],
    exact: Mapping[str, Array],
    baseline: Mapping[str, Array],
    gradient_bound: GradientBound = error_bound,
) -> dict[str, Errors]:
    """Return by name the errors that a step's results may inherit from others with their own rows.

    The gradient norm is one sum over all parameters in the dtype under test; the oracle sums it
    in float64, so that its float32 baseline says nothing of that error. Clipping multiplies every
    gradient by its error, which counts up to its bound. AdamW's first step inherits the error
    that a gradient may have by ``gradient_bound``.
    """
    bounds: dict[str, Errors] = {}
    sizes = {n.removeprefix("grad "): v.size for n, v in exact.items() if n.startswith("grad ")}
    summed = LAMBDA * math.sqrt(sum(sizes.values())) * UNIT_ROUNDOFF[dtype]
    lr = optim.learning_rate(0 if task.state is None else task.state.step, task.hyper)
    for run in task.clip_limits:
        norm_name = f"{run} grad_norm"
        if norm_name not in exact:
            continue
        norm = float(exact[norm_name].item())
        factor = min(1.0, task.clip_limits[run] / norm) if norm > 0 else 1.0
        of_norm = 0.0
        if factor < 1.0 + summed:
            of_norm = summed
            if norm_name in theirs:
                of_norm = min(summed, errors(theirs[norm_name], exact[norm_name]).worst)
        bounds[norm_name] = Errors(summed, summed, summed)
        for name in sizes:
            gradient, step = exact[f"grad {name}"], exact[f"{run} step {name}"]
            given = gradient, [baseline[f"grad {name}"]], dtype
            limit = gradient_bound(*given)
            wider = Errors(*map(operator.sub, limit, error_bound(*given)))
            moments = exact[f"{run} exp_avg {name}"], exact[f"{run} exp_avg_sq {name}"]
            change = _change_of_step(task, np.abs(gradient) * factor, moments)
            grown = through_adam(
                Errors(*(of_norm + part for part in limit)) if task.state else limit,
                np.abs(gradient) * factor,
                np.abs(step) / lr if lr > 0 else np.ones_like(step),
                change,
            )
            bounds[f"{run} step {name}"] = Errors(*(of_norm + part for part in grown))
            of_moments = _errors_of_moments(
                task, limit, wider, np.abs(gradient) * factor, moments, of_norm
            )
            bounds[f"{run} exp_avg {name}"], bounds[f"{run} exp_avg_sq {name}"] = of_moments
    return bounds


def _change_of_step(
    task: Task, gradient: Array, moments: tuple[Array, Array]
) -> Callable[[Any], Array]:
    """Return a function of a gradient's change d: the largest change of AdamW's step, over lr.

    ``gradient`` is |g| and ``moments`` are those after the step, all [1, R, C]. The first step is
    g / (|g| + eps): d moves it by at most d eps / (|g| - d + eps)^2, which is little for a large
    gradient and d / eps for one that vanishes. A further one is m / (s + eps), s = sqrt(v), with
    dm/dg = a = (1 - b1) / (1 - b1^t), and ds/dg is at most r = sqrt((1 - b2) / (1 - b2^t)): it
    moves by at most d a / (s + eps) + (|m| + d a) d r / (s + eps)^2 at the least s between.
    """
    hyper, eps = task.hyper, task.hyper.adam_eps

    def first(d: Any) -> Array:
        change: Array = d * eps / (np.maximum(gradient - d, 0.0) + eps) ** 2
        return change

    if task.state is None:
        return first
    t = task.state.step + 1
    of_m, of_v = 1 - hyper.beta1**t, 1 - hyper.beta2**t
    a, r2 = (1 - hyper.beta1) / of_m, (1 - hyper.beta2) / of_v
    m, before = np.abs(moments[0]) / of_m, moments[1] / of_v - r2 * gradient**2

    def further(d: Any) -> Array:
        least = np.maximum(before, 0.0) + r2 * np.maximum(gradient - d, 0.0) ** 2
        size = np.sqrt(least) + eps
        change: Array = d * a / size + (m + d * a) * d * math.sqrt(r2) / size**2
        return change

    return further


def _rms(x: Array, axis: int | None = None) -> Array:
    return np.sqrt(np.mean(x * x, axis=axis, keepdims=True))


def _ratio(error: Array, size: Array) -> float:
    return float(np.max(np.divide(error, size, out=np.zeros_like(error), where=size > 0)))


def _grown(limit: Errors, part: Array, whole: Array) -> Errors:
    """Return the errors, relative to ``whole``, of those of ``limit`` relative to a part of it."""
    return Errors(
        rms=limit.rms * _ratio(_rms(part), _rms(whole)),
        worst=limit.worst * _ratio(part.max(keepdims=True), whole.max(keepdims=True)),
        token=limit.token * _ratio(_rms(part, -1), _rms(whole, -1)),
    )


def _errors_of_moments(
    task: Task,
    limit: Errors,
    wider: Errors,
    gradient: Array,
    moments: tuple[Array, Array],
    of_norm: float,
) -> tuple[Errors, Errors]:
    """Return the errors of AdamW's moments after the step, as arguments of ``_change_of_step``.

    Besides the norm's error ``of_norm`` a gradient's of ``limit`` makes one of (1 - b1) d in the
    first moment, which may have cancelled with what was there before, and of 2 (1 - b2) g d in
    the second. The first moment of a first step is the gradient, with the same bound: ``wider``
    is by how much that exceeds the bound of the moment's own baseline.
    """
    largest = gradient.max(axis=-1, keepdims=True)
    second = _grown(limit, (1 - task.hyper.beta2) * gradient * largest, moments[1])
    second = Errors(*(2 * (part + of_norm) for part in second))
    if task.state is None:
        return Errors(*(of_norm + part for part in wider)), second
    both = Errors(*(part + of_norm for part in limit))
    return _grown(both, (1 - task.hyper.beta1) * gradient, np.abs(moments[0])), second


def through_adam(
    limit: Errors, gradient: Array, step: Array, change: Callable[[Any], Array]
) -> Errors:
    """Return the error of AdamW's step from an error of ``limit`` in a gradient, both [1, R, C].

    ``change`` is that of ``_change_of_step``; ``gradient`` and ``step``, over lr, are sizes.
    """
    return Errors(
        rms=_ratio(_rms(change(limit.rms * _rms(gradient))), _rms(step)),
        worst=_ratio(
            change(limit.worst * gradient.max()).max(keepdims=True), step.max(keepdims=True)
        ),
        token=_ratio(_rms(change(limit.token * _rms(gradient, -1)), -1), _rms(step, -1)),
    )
