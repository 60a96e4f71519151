"""The training step as pure functions: accumulation, clipping, AdamW, learning rate schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
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

# Added to the norm before dividing, as torch's clip_grad_norm_ does.
CLIP_EPS = 1e-6


# Field -> whether a value is in its domain, and the domain in words. Outside, a step is no number.
DOMAINS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: 0 <= value < math.inf, "zero or positive, and finite"),
    "beta1": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "beta2": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "adam_eps": (lambda value: 0 < value < math.inf, "positive and finite"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "zero or positive, and finite"),
    "grad_clip": (lambda value: value > 0, "positive"),
    "warmup_steps": (lambda value: value >= 0, "zero or positive"),
    "steps": (lambda value: value >= 0, "zero or positive"),
    "final_lr_ratio": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "z_loss": (lambda value: 0 <= value < math.inf, "zero or positive, and finite"),
}


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a training run, named as the trainer's flags (Llama 2, section 2.2).

    Raises InputError naming a field outside its domain.
    """

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

    def __post_init__(self) -> None:
        for name, (is_inside, words) in DOMAINS.items():
            value = getattr(self, name)
            if not is_inside(value):
                raise InputError(f"{name} is {value!r}, and must be {words}")


class OptState(NamedTuple):
    """AdamW's state; the moments have their parameters' names and shapes."""

    step: int  # optimizer steps taken
    exp_avg: Params  # first moments m
    exp_avg_sq: Params  # second moments v


class Metrics(NamedTuple):
    """Loss, gradient norm, learning rate and gradients of one optimizer step."""

    loss: float  # mean over the step's valid targets, before the update
    grad_norm: float  # global, before clipping
    lr: float
    grads: Grads  # of the mean loss, before clipping


def init_state(params: Mapping[str, Array]) -> OptState:
    """Return AdamW's state before the first step: step 0 and zero moments."""
    zeros = [{name: np.zeros_like(value) for name, value in params.items()} for _ in range(2)]
    return OptState(0, *zeros)


def learning_rate(step: int, hyper: Hyperparameters) -> float:
    """Return the learning rate of step t (from 0): linear warmup, then cosine decay.

    ``lr (t + 1) / w`` for t < w, then ``lr (r + (1 - r) (1 + cos(pi p)) / 2)`` with
    ``p = min(1, (t - w) / (steps - 1 - w))``, w the warmup steps and r the ratio of the final to
    the highest rate (Llama 2 paper, section 2.2).
    """
    warmup = min(hyper.warmup_steps, hyper.steps)
    if step < warmup:
        return hyper.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, hyper.steps - 1 - warmup))
    ratio = hyper.final_lr_ratio
    return hyper.lr * (ratio + (1.0 - ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def global_norm(grads: Mapping[str, Array]) -> float:
    """Return ``sqrt(sum g^2)`` over every element of every gradient, summed in float64."""
    return math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))


def clip(grads: Mapping[str, Array], max_norm: float) -> tuple[Grads, float]:
    """Return ``g min(1, max_norm / (|g| + 1e-6))`` of every gradient, and the norm |g| before.

    |g| is the global norm, so that all are scaled by one factor (Pascanu et al. 2013).
    """
    norm = global_norm(grads)
    factor = min(1.0, max_norm / (norm + CLIP_EPS))
    return {name: g * factor for name, g in grads.items()}, norm


def decays(p: Array) -> bool:
    """Return whether weight decay applies to a parameter: to matrices, not to norm weights."""
    return p.ndim >= 2


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    """Return a parameter p and its moments m (exp_avg), v (exp_avg_sq) after step t, from 1.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, and with m_hat = m / (1 - b1^t),
    v_hat = v / (1 - b2^t): ``p = p (1 - lr decay) - lr m_hat / (sqrt(v_hat) + eps)`` (Loshchilov
    and Hutter 2019, algorithm 2, with the decay scaled by lr, as PyTorch does). All have the
    parameter's shape; decay never enters the moments.
    """
    m = hyper.beta1 * m + (1.0 - hyper.beta1) * g
    v = hyper.beta2 * v + (1.0 - hyper.beta2) * (g * g)
    m_hat = m / (1.0 - hyper.beta1**step)
    v_hat = v / (1.0 - hyper.beta2**step)
    updated: Array = p * (1.0 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + hyper.adam_eps)
    return updated, m, v


def accumulate(
    params: Mapping[str, Array],
    batches: Sequence[Batch],
    config: LlamaConfig,
    z_loss: float = 0.0,
    vjps: grad.Vjps = grad.REFERENCE_VJPS,
    ops: Ops = ops,
) -> tuple[float, Grads]:
    """Return the mean loss over every valid target of every batch, and its gradients.

    ``sum over batches of cross_entropy_sum / n_valid``, n_valid being the valid targets of all
    batches: in a mean of the batches' means a token of a batch with few valid targets would weigh
    more. ``z_loss``, ``vjps`` and ``ops`` as in grad.loss_and_grads. Raises InputError where no
    target is valid.
    """
    n_valid = int(sum(np.sum(batch.targets != IGNORE) for batch in batches))
    if n_valid == 0:
        raise InputError("a training step without a single valid target has no loss")
    loss = 0.0
    total: Grads = {}
    for batch in batches:
        part, grads = grad.loss_and_grads(
            params, batch, config, n_valid=n_valid, z_loss=z_loss, vjps=vjps, ops=ops
        )
        loss += part
        total = {name: total[name] + g if total else g for name, g in grads.items()}
    return loss, total


# The rules of ``train_step``; a namespace with some replaced is a trainer with a bug.
REFERENCE_RULES = SimpleNamespace(accumulate=accumulate, clip=clip, adamw=adamw, decays=decays)


def train_step(
    params: Mapping[str, Array],
    state: OptState,
    batches: Sequence[Batch],
    config: LlamaConfig,
    hyper: Hyperparameters,
    *,
    rules: ModuleType | SimpleNamespace = REFERENCE_RULES,
    vjps: grad.Vjps = grad.REFERENCE_VJPS,
) -> tuple[Params, OptState, Metrics]:
    """Return the parameters, AdamW's state and the metrics after one optimizer step.

    Accumulates the gradients of ``batches``, clips them and applies AdamW at the step's learning
    rate, in the dtype of the parameters, float32 or float64. Changes none of its arguments.
    ``rules`` and ``vjps`` are its operations. Raises InputError where no target is valid.
    """
    loss, grads = rules.accumulate(params, batches, config, hyper.z_loss, vjps)
    clipped, norm = rules.clip(grads, hyper.grad_clip)
    lr, step = learning_rate(state.step, hyper), state.step + 1
    updated: dict[str, tuple[Any, ...]] = {
        name: rules.adamw(
            p,
            clipped[name],
            state.exp_avg[name],
            state.exp_avg_sq[name],
            step,
            lr,
            hyper.weight_decay if rules.decays(p) else 0.0,
            hyper,
        )
        for name, p in params.items()
    }
    new_params, exp_avg, exp_avg_sq = (
        {name: parts[i] for name, parts in updated.items()} for i in range(3)
    )
    return new_params, OptState(step, exp_avg, exp_avg_sq), Metrics(loss, norm, lr, grads)
