"""The training step: accumulation, clipping, AdamW, schedule; pure functions of their inputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import grad, ops
from .config import InputError, LlamaConfig
from .grad import Batch, Grads
from .model import Ops
from .ops import IGNORE, Array

Params = dict[str, Array]

# torch's clip_grad_norm_ divides by norm + 1e-6; a specification of trainers keeps it.
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a run (Llama 2 paper, section 2.2); the trainer's flags' names."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-5
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_steps: int = 20
    steps: int = 240
    final_lr_ratio: float = 0.1
    z_loss: float = 0.0


class OptState(NamedTuple):
    """AdamW's memory: steps taken, first and second moments by parameter name."""

    step: int
    exp_avg: Params
    exp_avg_sq: Params


class Metrics(NamedTuple):
    """What one step reports, and the gradients it computed."""

    loss: float  # mean over the step's valid targets, before the update
    grad_norm: float  # global, before clipping
    lr: float
    grads: Grads  # of the mean loss, before clipping


def init_state(params: Mapping[str, Array]) -> OptState:
    """Return AdamW's state before the first step: zero moments."""
    zeros = [{name: np.zeros_like(value) for name, value in params.items()} for _ in range(2)]
    return OptState(0, *zeros)


def learning_rate(step: int, hyper: Hyperparameters) -> float:
    """Return the rate of step t (from 0): linear warmup, then cosine to the final rate.

    ``lr (t + 1) / w`` for t < w, then ``lr (r + (1 - r) (1 + cos(pi p)) / 2)`` with
    ``p = min(1, (t - w) / (steps - 1 - w))`` and r the final ratio (Llama 2 paper, section 2.2).
    """
    warmup = min(hyper.warmup_steps, hyper.steps)
    if step < warmup:
        return hyper.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, hyper.steps - 1 - warmup))
    floor = hyper.final_lr_ratio
    return hyper.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def global_norm(grads: Mapping[str, Array]) -> float:
    """Return the Euclidean norm of all gradients together, accumulated in float64."""
    return math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))


def clip(grads: Mapping[str, Array], max_norm: float) -> tuple[Grads, float]:
    """Scale all gradients by one factor so that their global norm is at most ``max_norm``.

    ``g min(1, max_norm / (|g| + 1e-6))``; returns them and the norm before (Pascanu et al. 2013).
    """
    norm = global_norm(grads)
    factor = min(1.0, max_norm / (norm + CLIP_EPS))
    return {name: g * factor for name, g in grads.items()}, norm


def decays(value: Array) -> bool:
    """Return whether a parameter decays: matrices do, norm weights do not."""
    return value.ndim >= 2


def adamw(
    value: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    """Update one parameter at step ``step`` (from 1); return it and its moments.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, and with m' = m / (1 - b1^t),
    v' = v / (1 - b2^t): ``p = p (1 - lr decay) - lr m' / (sqrt(v') + eps)`` (Loshchilov and Hutter
    2019, algorithm 2). All have the parameter's shape; decay never enters the moments.
    """
    m = hyper.beta1 * m + (1.0 - hyper.beta1) * g
    v = hyper.beta2 * v + (1.0 - hyper.beta2) * (g * g)
    m_hat = m / (1.0 - hyper.beta1**step)
    v_hat = v / (1.0 - hyper.beta2**step)
    updated: Array = value * (1.0 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + hyper.adam_eps)
    return updated, m, v


def accumulate(
    params: Mapping[str, Array],
    batches: Sequence[Batch],
    config: LlamaConfig,
    hyper: Hyperparameters,
    vjps: grad.Vjps = grad.REFERENCE,
    ops: Ops = ops,
) -> tuple[float, Grads]:
    """Return the mean loss over every valid target of every batch, and its gradient.

    One divisor for the whole step: in a mean of the batches' means a token of a batch with few
    valid targets would count for more. ``ops`` and ``vjps`` compute the forward and the backward
    pass. Raises InputError where nothing is valid.
    """
    n_valid = int(sum(np.sum(batch.targets != IGNORE) for batch in batches))
    if n_valid == 0:
        raise InputError("a training step without a single valid target has no loss")
    loss = 0.0
    total: Grads = {}
    for batch in batches:
        part, grads = grad.loss_and_grads(
            params, batch, config, n_valid=n_valid, z_loss=hyper.z_loss, vjps=vjps, ops=ops
        )
        loss += part
        total = {name: total[name] + g if total else g for name, g in grads.items()}
    return loss, total


# What train_step calls; a namespace with some replaced is a trainer with a bug.
REFERENCE = SimpleNamespace(accumulate=accumulate, clip=clip, adamw=adamw, decays=decays)


def train_step(
    params: Mapping[str, Array],
    state: OptState,
    batches: Sequence[Batch],
    config: LlamaConfig,
    hyper: Hyperparameters,
    *,
    rules: ModuleType | SimpleNamespace = REFERENCE,
    vjps: grad.Vjps = grad.REFERENCE,
) -> tuple[Params, OptState, Metrics]:
    """Take one whole optimizer step; nothing that goes in is changed.

    Computes in the dtype of the parameters, float32 or float64.
    """
    loss, grads = rules.accumulate(params, batches, config, hyper, vjps)
    clipped, norm = rules.clip(grads, hyper.grad_clip)
    lr, step = learning_rate(state.step, hyper), state.step + 1
    updated: dict[str, tuple[Any, ...]] = {
        name: rules.adamw(
            value,
            clipped[name],
            state.exp_avg[name],
            state.exp_avg_sq[name],
            step,
            lr,
            hyper.weight_decay if rules.decays(value) else 0.0,
            hyper,
        )
        for name, value in params.items()
    }
    new, m, v = ({name: parts[i] for name, parts in updated.items()} for i in range(3))
    return new, OptState(step, m, v), Metrics(loss, norm, lr, grads)
