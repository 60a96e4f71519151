"""LLaMA 2's operations as pure functions, each with its equation.

Axes: B batch, T query position, S key position, D dim, H query heads, N key/value heads,
R query heads per key/value head (H = N * R), K head_dim, F hidden_dim, V vocabulary.

Everything is computed in the dtype that comes in, float32 or float64. Scalars are Python
floats throughout: a NumPy float64 scalar would widen a float32 array.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .config import LlamaConfig
from .naming import EMBED, LM_HEAD

Array = NDArray[Any]

IGNORE = -100  # a target that adds nothing to the loss, as PyTorch's ignore_index


def read(params: Mapping[str, Array], name: str, config: LlamaConfig) -> Array:
    """Return one parameter by its Hugging Face name; with tied embeddings the head is E [V, D]."""
    return params[EMBED if name == LM_HEAD and config.tie_embeddings else name]


def embed(weight_VD: Array, tokens_BT: Array) -> Array:
    """Return the token embeddings ``E[tokens]``: [V, D], [B, T] -> [B, T, D]."""
    vectors: Array = weight_VD[tokens_BT]
    return vectors


def linear(x: Array, weight: Array) -> Array:
    """Return ``x W^T`` over the last axis: [..., in], [out, in] -> [..., out]; without bias."""
    # One 2-D product: NumPy hands it to BLAS whole instead of looping over the batch.
    y: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    return y.reshape(*x.shape[:-1], weight.shape[0])


def rms_norm(x: Array, weight_D: Array, eps: float) -> Array:
    """Return ``x / sqrt(mean(x^2) + eps) * w``, RMSNorm: [..., D] -> the same.

    The mean is over the last axis; eps is inside the root (Zhang and Sennrich 2019, eq. 4).
    """
    mean_square = np.vecdot(x, x)[..., None] / x.shape[-1]
    y: Array = x / np.sqrt(mean_square + eps) * weight_D
    return y


def rope_frequencies(config: LlamaConfig) -> Array:
    """Return the rotary frequencies [K / 2] in float64: ``theta^(-2 i / K)`` (Su et al. 2021).

    For contexts longer than the trained one they are scaled: "linear" is ``f / factor`` (Chen et
    al. 2023, position interpolation); "llama3" is ``f (g + (1 - g) / factor)`` with
    ``g = clip((L f / (2 pi) - low) / (high - low), 0, 1)``, L being the original context
    (Grattafiori et al. 2024, section 3.4, as released with Llama 3.1): a frequency that turns more
    than ``high`` times within L stays, one that turns less than ``low`` times is divided.
    """
    steps = -np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies: Array = config.rope_theta**steps
    if config.rope_type == "linear":
        frequencies = frequencies / config.rope_factor
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
        g = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (g + (1.0 - g) / config.rope_factor)
    return frequencies


def rope_tables(positions_BT: Array, config: LlamaConfig, dtype: DTypeLike) -> tuple[Array, Array]:
    """Return cos(m f_i) and sin(m f_i) for position m: [B, T] -> two [B, T, K / 2].

    As in Su et al. 2021, eq. 15. Computed in float64 whatever ``dtype`` is, and rounded to it
    once: at position 65,536 a float32 product is already off by 4e-3 radians.
    """
    angles = positions_BT[..., None].astype(np.float64) * rope_frequencies(config)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def apply_rope(x_BTHK: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair (i, i + K / 2) by its angle: the rotate-half form (Su et al. 2021, eq. 34).

    ``(a, b) -> (a cos - b sin, b cos + a sin)``: [B, T, H, K] -> the same, with cos and sin
    [B, T, K / 2] (or one row for the whole batch); keys likewise, with N heads. Hugging Face
    weights are stored for this pairing; Meta's pair neighbours (2i, 2i + 1).
    """
    half = x_BTHK.shape[-1] // 2
    first, second = x_BTHK[..., :half], x_BTHK[..., half:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def split_heads(x_BTE: Array, head_dim: int) -> Array:
    """Split the last axis into heads: [B, T, H * K] -> [B, T, H, K], head-major."""
    return x_BTE.reshape(*x_BTE.shape[:-1], -1, head_dim)


def merge_heads(x_BTHK: Array) -> Array:
    """Concatenate the heads: [B, T, H, K] -> [B, T, H * K], the inverse of ``split_heads``."""
    return x_BTHK.reshape(*x_BTHK.shape[:-2], -1)


def group_queries(q_BTHK: Array, n_kv_heads: int) -> Array:
    """Group the query heads by key/value head: [B, T, H, K] -> [B, N, R, T, K].

    Query head h reads key/value head ``h // R`` (Ainslie et al. 2023): consecutive query
    heads share one.
    """
    batch, length, heads, width = q_BTHK.shape
    grouped = q_BTHK.reshape(batch, length, n_kv_heads, heads // n_kv_heads, width)
    return grouped.transpose(0, 2, 3, 1, 4)


def ungroup_queries(x_BNRTK: Array) -> Array:
    """Return the heads in one axis: [B, N, R, T, K] -> [B, T, H, K], as before grouping."""
    batch, groups, repeats, length, width = x_BNRTK.shape
    return x_BNRTK.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * repeats, width)


def attention_scores(q_BNRTK: Array, k_BNSK: Array) -> Array:
    """Return ``q k^T / sqrt(K)`` [B, N, R, T, S] (Vaswani et al. 2017, eq. 1)."""
    batch, groups, repeats, length, width = q_BNRTK.shape
    # R and T share one axis for the product, so that no key is copied for its R readers.
    rows = q_BNRTK.reshape(batch, groups, repeats * length, width)
    scores: Array = (rows * (1.0 / math.sqrt(width))) @ k_BNSK.swapaxes(-1, -2)
    return scores.reshape(batch, groups, repeats, length, -1)


def masked_softmax(scores_BNRTS: Array, mask_BTS: Array) -> Array:
    """Return attention weights [B, N, R, T, S]: ``exp(s - max s) / sum exp(s - max s)`` over S.

    Maximum and sum run over the keys that ``mask`` [B, T, S] allows (True = may attend); the
    weight of any other key is 0. Subtracting the row's maximum keeps exp from overflowing. A query
    that may attend to no key (padding) gets all-zero weights rather than 0 / 0.
    """
    # In place on a copy: scores are the largest arrays of a long prompt, and np.where is slow.
    weights = scores_BNRTS.copy()
    np.copyto(weights, -math.inf, where=~mask_BTS[:, None, None])
    # A finite top keeps a row without any allowed score from becoming inf - inf.
    lowest = np.finfo(weights.dtype).min
    weights -= weights.max(axis=-1, keepdims=True, initial=lowest)
    np.exp(weights, out=weights)
    # The top contributes e^0, so that only a row without any allowed score sums to less than 1.
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
    return weights


def attention_mix(weights_BNRTS: Array, v_BNSK: Array) -> Array:
    """Return ``sum over s of w_s v_s``: [B, N, R, T, S], [B, N, S, K] -> [B, N, R, T, K]."""
    batch, groups, repeats, length, keys = weights_BNRTS.shape
    mixed: Array = weights_BNRTS.reshape(batch, groups, repeats * length, keys) @ v_BNSK
    return mixed.reshape(batch, groups, repeats, length, -1)


def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + e^-x)`` of every element, for x < 0 as ``e^x / (1 + e^x)``.

    The argument of exp is never positive, so exp cannot overflow.
    """
    decay = np.exp(-np.abs(x))
    # The numerator: 1 where x >= 0, elsewhere the decay e^x, which is below 1.
    y: Array = np.maximum(decay, x >= 0) / (1.0 + decay)
    return y


def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)`` of every element, without overflow (Elfwing et al. 2018)."""
    return x * sigmoid(x)


def swiglu(gate: Array, up: Array) -> Array:
    """Return ``silu(gate) * up``, each [B, T, F] (Shazeer 2020, eq. 6)."""
    return silu(gate) * up


def log_sum_exp(logits: Array) -> Array:
    """Return ``log(sum(exp(l)))`` over the last axis: [..., V] -> [..., 1]; cannot overflow."""
    top = logits.max(axis=-1, keepdims=True)
    total: Array = top + np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True))
    return total


def cross_entropy_sum(logits_BTV: Array, targets_BT: Array, z_loss: float = 0.0) -> Array:
    """Return ``sum(log Z - l_target + z_loss (log Z)^2)`` in nats, a scalar array.

    The sum is over every position whose target [B, T] is not IGNORE; l_target is the target's
    logit, log Z the log-sum-exp of all V.
    """
    valid = targets_BT != IGNORE
    log_z = log_sum_exp(logits_BTV)[..., 0][valid]
    chosen = logits_BTV[valid, targets_BT[valid]]
    total: Array = np.sum(log_z - chosen + z_loss * log_z * log_z)
    return total


def add(x_BTD: Array, h_BTD: Array) -> Array:
    """Return ``x + h`` [B, T, D], the residual stream after a sublayer (He et al. 2015)."""
    y: Array = x_BTD + h_BTD
    return y


def extend(past_BNSK: Array, new_BNTK: Array) -> Array:
    """Append this call's keys or values to the cached: [B, N, S, K] -> [B, N, S + T, K]."""
    return np.concatenate([past_BNSK, new_BNTK], axis=2)


def next_positions(length: int, start: int) -> Array:
    """Return the positions [T] of ``length`` tokens that follow ``start`` cached ones."""
    return np.arange(start, start + length)


def causal_mask(n_queries: int, n_keys: int) -> Array:
    """Return the causal mask [T, S]: query t may attend to key s where ``s <= S - T + t``.

    With a cache there are more keys than queries; the last query is the last key's token.
    """
    query = np.arange(n_keys - n_queries, n_keys)[:, None]
    return np.arange(n_keys) <= query
