"""Known bugs of training code, each as one replaced operation of grad or optim.

A mutant is a bug of a published trainer (its citation names the report) or a common slip in
deriving a gradient by hand. The suite tells each from the reference by many times the tolerance.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from . import grad, ops, optim
from .config import LlamaConfig
from .grad import Batch, Grads
from .mutants import DERIVATION_SLIP, Mutant, round_bits
from .ops import IGNORE, Array
from .optim import Hyperparameters


def _norm_without_mean(x: Array, w: Array, eps: float, d: Array) -> tuple[Array, Array]:
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return d * w / root, grad.rms_norm_vjp(x, w, eps, d)[1]


def _norm_weight_from_input(x: Array, w: Array, eps: float, d: Array) -> tuple[Array, Array]:
    return grad.rms_norm_vjp(x, w, eps, d)[0], (d * x).reshape(-1, x.shape[-1]).sum(axis=0)


def _norm_weight_twice(x: Array, w: Array, eps: float, d: Array) -> tuple[Array, Array]:
    return grad.rms_norm_vjp(x, w, eps, d * w)[0], grad.rms_norm_vjp(x, w, eps, d)[1]


def _softmax_diagonal(weights: Array, d: Array) -> Array:
    return weights * (1.0 - weights) * d


def _softmax_without_sum(weights: Array, d: Array) -> Array:
    return weights * d


def _rope_forward_angle(cos: Array, sin: Array, d: Array) -> Array:
    return ops.apply_rope(d, cos, sin)


def _rope_identity(cos: Array, sin: Array, d: Array) -> Array:
    return d


def _scores_without_scale(q: Array, k: Array, d: Array) -> tuple[Array, Array]:
    d_q, d_k = grad.attention_scores_vjp(q, k, d)
    return d_q * math.sqrt(q.shape[-1]), d_k * math.sqrt(q.shape[-1])


def _keys_from_first_head(q: Array, k: Array, d: Array) -> tuple[Array, Array]:
    d_q = grad.attention_scores_vjp(q, k, d)[0]
    return d_q, grad.attention_scores_vjp(q[:, :, :1], k, d[:, :, :1])[1]


def _keys_averaged(q: Array, k: Array, d: Array) -> tuple[Array, Array]:
    d_q, d_k = grad.attention_scores_vjp(q, k, d)
    return d_q, d_k / q.shape[2]


def _values_from_first_head(weights: Array, v: Array, d: Array) -> tuple[Array, Array]:
    d_weights = grad.attention_mix_vjp(weights, v, d)[0]
    return d_weights, grad.attention_mix_vjp(weights[:, :, :1], v, d[:, :, :1])[1]


def _embed_forgotten(weight: Array, tokens: Array, d: Array) -> Array:
    return np.zeros_like(weight)


def _embed_last_wins(weight: Array, tokens: Array, d: Array) -> Array:
    d_weight = np.zeros_like(weight)
    d_weight[tokens] += d
    return d_weight


def _embed_sum_bf16(weight: Array, tokens: Array, d: Array) -> Array:
    d_weight = np.zeros_like(weight)
    for token, row in zip(tokens.ravel(), round_bits(d, 8).reshape(-1, d.shape[-1]), strict=True):
        d_weight[token] = round_bits(d_weight[token] + row, 8)
    return d_weight


def _silu_without_second_term(gate: Array, up: Array, d: Array) -> tuple[Array, Array]:
    return d * up * ops.sigmoid(gate), d * ops.silu(gate)


def _up_from_gate(gate: Array, up: Array, d: Array) -> tuple[Array, Array]:
    return grad.swiglu_vjp(gate, up, d)[0], d * gate


def _loss_per_row(logits: Array, targets: Array, n_valid: int, z_loss: float) -> Array:
    return grad.cross_entropy_vjp(logits, targets, len(targets), z_loss)


def _padding_learnt(logits: Array, targets: Array, n_valid: int, z_loss: float) -> Array:
    return grad.cross_entropy_vjp(logits, np.where(targets == IGNORE, 0, targets), n_valid, z_loss)


def _z_loss_forgotten(logits: Array, targets: Array, n_valid: int, z_loss: float) -> Array:
    return grad.cross_entropy_vjp(logits, targets, n_valid, 0.0)


def _mean_of_means(
    params: Mapping[str, Array],
    batches: Sequence[Batch],
    config: LlamaConfig,
    z_loss: float,
    vjps: grad.Vjps,
) -> tuple[float, Grads]:
    parts = [optim.accumulate(params, [batch], config, z_loss, vjps) for batch in batches]
    loss = sum(loss for loss, _ in parts) / len(parts)
    total = {n: np.sum([g[n] for _, g in parts], axis=0) for n in params}
    return loss, {n: g / len(parts) for n, g in total.items()}


def _clip_each(grads: Grads, max_norm: float) -> tuple[Grads, float]:
    clipped = {name: optim.clip({name: g}, max_norm)[0][name] for name, g in grads.items()}
    return clipped, optim.global_norm(grads)


def _clip_always(grads: Grads, max_norm: float) -> tuple[Grads, float]:
    norm = optim.global_norm(grads)
    return {name: g * (max_norm / (norm + optim.CLIP_EPS)) for name, g in grads.items()}, norm


def _clip_by_value(grads: Grads, max_norm: float) -> tuple[Grads, float]:
    clipped = {name: np.clip(g, -max_norm, max_norm) for name, g in grads.items()}
    return clipped, optim.global_norm(grads)


def _moments(g: Array, m: Array, v: Array, hyper: Hyperparameters) -> tuple[Array, Array]:
    return (
        hyper.beta1 * m + (1.0 - hyper.beta1) * g,
        hyper.beta2 * v + (1.0 - hyper.beta2) * g * g,
    )


def _adam_uncorrected(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    m, v = _moments(g, m, v, hyper)
    return p * (1.0 - lr * decay) - lr * m / (np.sqrt(v) + hyper.adam_eps), m, v


def _adam_eps_inside(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    m, v = _moments(g, m, v, hyper)
    m_hat, v_hat = m / (1.0 - hyper.beta1**step), v / (1.0 - hyper.beta2**step)
    return p * (1.0 - lr * decay) - lr * m_hat / np.sqrt(v_hat + hyper.adam_eps), m, v


def _decay_in_gradient(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    return optim.adamw(p, g + decay * p, m, v, step, lr, 0.0, hyper)


def _decay_without_rate(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    return optim.adamw(p, g, m, v, step, lr, decay / lr, hyper)


def _step_one_too_many(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    decay: float,
    hyper: Hyperparameters,
) -> tuple[Array, Array, Array]:
    return optim.adamw(p, g, m, v, step + 1, lr, decay, hyper)


TRAINING = (
    Mutant(
        "norm_without_mean",
        "RMSNorm's gradient treats the root as a constant",
        DERIVATION_SLIP,
        "rms_norm_vjp",
        _norm_without_mean,
    ),
    Mutant(
        "norm_weight_from_input",
        "the norm weight's gradient uses x, not the normalised x",
        DERIVATION_SLIP,
        "rms_norm_vjp",
        _norm_weight_from_input,
    ),
    Mutant(
        "norm_weight_twice",
        "the norm weight enters the input's gradient twice",
        DERIVATION_SLIP,
        "rms_norm_vjp",
        _norm_weight_twice,
    ),
    Mutant(
        "softmax_diagonal",
        "softmax's gradient keeps the Jacobian's diagonal only",
        DERIVATION_SLIP,
        "masked_softmax_vjp",
        _softmax_diagonal,
    ),
    Mutant(
        "softmax_without_sum",
        "softmax's gradient drops the subtracted sum",
        DERIVATION_SLIP,
        "masked_softmax_vjp",
        _softmax_without_sum,
    ),
    Mutant(
        "rope_forward_angle",
        "the gradient is rotated forward instead of back",
        DERIVATION_SLIP,
        "apply_rope_vjp",
        _rope_forward_angle,
    ),
    Mutant(
        "rope_identity",
        "the gradient is not rotated at all",
        DERIVATION_SLIP,
        "apply_rope_vjp",
        _rope_identity,
    ),
    Mutant(
        "scores_without_scale",
        "the 1/sqrt(K) of the scores is missing from their gradient",
        DERIVATION_SLIP,
        "attention_scores_vjp",
        _scores_without_scale,
    ),
    Mutant(
        "keys_from_first_head",
        "a shared key's gradient comes from one of its query heads",
        DERIVATION_SLIP,
        "attention_scores_vjp",
        _keys_from_first_head,
    ),
    Mutant(
        "keys_averaged",
        "a shared key's gradient is averaged over its query heads, not summed",
        DERIVATION_SLIP,
        "attention_scores_vjp",
        _keys_averaged,
    ),
    Mutant(
        "values_from_first_head",
        "a shared value's gradient comes from one of its query heads",
        DERIVATION_SLIP,
        "attention_mix_vjp",
        _values_from_first_head,
    ),
    Mutant(
        "embedding_forgotten",
        "an embedding is trained by its use as the head alone",
        DERIVATION_SLIP,
        "embed_vjp",
        _embed_forgotten,
    ),
    Mutant(
        "embedding_last_wins",
        "a token that occurs twice keeps one of its gradients",
        "NumPy's fancy-index +=",
        "embed_vjp",
        _embed_last_wins,
    ),
    Mutant(
        "embedding_sum_bf16",
        "a token's gradients are added up in bfloat16, where ones stop at 256",
        "mxnet#17703, tt-metal#36341",
        "embed_vjp",
        _embed_sum_bf16,
    ),
    Mutant(
        "silu_without_second_term",
        "SiLU's gradient is sigmoid(x) alone",
        DERIVATION_SLIP,
        "swiglu_vjp",
        _silu_without_second_term,
    ),
    Mutant(
        "up_from_gate",
        "the up projection's gradient skips the activation",
        DERIVATION_SLIP,
        "swiglu_vjp",
        _up_from_gate,
    ),
    Mutant(
        "loss_per_row",
        "the loss is divided by the rows of the batch, not by its tokens",
        DERIVATION_SLIP,
        "cross_entropy_vjp",
        _loss_per_row,
    ),
    Mutant(
        "padding_learnt",
        "ignored targets are learnt as token 0",
        DERIVATION_SLIP,
        "cross_entropy_vjp",
        _padding_learnt,
    ),
    Mutant(
        "z_loss_forgotten",
        "the z-loss is reported and never differentiated",
        DERIVATION_SLIP,
        "cross_entropy_vjp",
        _z_loss_forgotten,
    ),
    Mutant(
        "mean_of_means",
        "accumulation averages the micro-batches' means (PARITY 22)",
        "transformers#34191, trl#2175",
        "accumulate",
        _mean_of_means,
    ),
    Mutant(
        "clip_each", "clipping is done for each tensor alone", DERIVATION_SLIP, "clip", _clip_each
    ),
    Mutant(
        "clip_always",
        "gradients under the limit are scaled up to it",
        DERIVATION_SLIP,
        "clip",
        _clip_always,
    ),
    Mutant(
        "clip_by_value",
        "elements are clipped, not the norm",
        DERIVATION_SLIP,
        "clip",
        _clip_by_value,
    ),
    Mutant(
        "adam_uncorrected",
        "Adam without bias correction (PARITY 21)",
        "mlx#1640",
        "adamw",
        _adam_uncorrected,
    ),
    Mutant(
        "adam_eps_inside",
        "Adam's eps inside the square root (PARITY 21)",
        "torchani#261",
        "adamw",
        _adam_eps_inside,
    ),
    Mutant(
        "adam_step_from_one_too_many",
        "bias correction counts one step too many",
        DERIVATION_SLIP,
        "adamw",
        _step_one_too_many,
    ),
    Mutant(
        "decay_in_gradient",
        "weight decay is added to the gradient (L2), not decoupled",
        "Loshchilov and Hutter 2019, section 2",
        "adamw",
        _decay_in_gradient,
    ),
    Mutant(
        "decay_without_rate",
        "decoupled decay is not scaled by the learning rate",
        DERIVATION_SLIP,
        "adamw",
        _decay_without_rate,
    ),
    Mutant(
        "decay_on_norms", "norm weights decay too", DERIVATION_SLIP, "decays", lambda value: True
    ),
)
