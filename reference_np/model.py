"""The forward pass of LLaMA 2 (Touvron et al. 2023): token ids in, logits and the new cache out.

Axes: B batch, T query position (this call's tokens), S key position (cache and this call),
D dim, H query heads, N key/value heads, R query heads of one of them, K head_dim, F hidden_dim,
V vocabulary.
"""

from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

from . import ops as reference_ops
from .config import InputError, LlamaConfig
from .naming import EMBED, LM_HEAD, NORM, layer_shapes
from .ops import Array

Trace = Callable[[str, Array], None]
Ops = ModuleType | SimpleNamespace


class Cache(NamedTuple):
    """The rotated keys and the values of every layer, each [B, N, S, K]; never written to."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def length(self) -> int:
        """The number of cached positions S, padding included."""
        return int(self.keys[0].shape[2])


def no_trace(name: str, value: Array) -> None:
    """Ignore one activation."""


def forward(
    params: Mapping[str, Array],
    tokens_BT: Array,
    config: LlamaConfig,
    *,
    positions: Array | None = None,
    mask: Array | None = None,
    cache: Cache | None = None,
    trace: Trace = no_trace,
    ops: Ops = reference_ops,
) -> tuple[Array, Cache]:
    """Compute logits [B, T, V] and the cache that continues the sequence.

    x = E[tokens], then ``x = block(x)`` n_layers times, and ``logits = norm(x) W_head^T``.

    params     Hugging Face name -> array, all float32 or all float64; may be lazy: each
               tensor is read once (a tied embedding twice), one layer at a time.
    tokens_BT  int [B, T], ids below config.vocab_size.
    config     the architecture.
    positions  int [B, T], the rotary positions; default: they follow the cache.
    mask       bool [B, T, S], True = may attend; default: causal.
    cache      of the calls before; it is not changed. S counts its positions and the new ones.
    trace      called with every activation of naming.activation_axes as it is computed, before
               it is used: values written into the array are what the rest is computed from.
    ops        the operations; a namespace with some replaced is a different model.

    Raises InputError for ids outside the vocabulary and for misshapen arguments.
    """
    start = 0 if cache is None else cache.length
    positions, mask = fill_and_check_inputs(tokens_BT, positions, mask, start, config, ops)
    x_BTD = ops.embed(ops.read(params, EMBED, config), tokens_BT)
    trace("embed", x_BTD)
    tables = ops.rope_tables(positions, config, x_BTD.dtype)
    keys, values = [], []
    for i in range(config.n_layers):
        past = None if cache is None else (cache.keys[i], cache.values[i])
        layer = layer_params(params, i, config, ops)
        x_BTD, (k, v) = block(
            layer, x_BTD, config, tables, mask, past, _prefixed(trace, f"layers.{i}."), ops
        )
        keys.append(k)
        values.append(v)
    return head(params, x_BTD, config, trace, ops), Cache(tuple(keys), tuple(values))


def head(
    params: Mapping[str, Array],
    x_BTD: Array,
    config: LlamaConfig,
    trace: Trace = no_trace,
    ops: Ops = reference_ops,
) -> Array:
    """Return ``norm(x) W_head^T`` [B, T, V], the logits of the last block's output x [B, T, D]."""
    x_BTD = ops.rms_norm(x_BTD, ops.read(params, NORM, config), config.norm_eps)
    trace("norm", x_BTD)
    logits_BTV: Array = ops.linear(x_BTD, ops.read(params, LM_HEAD, config))
    trace("logits", logits_BTV)
    return logits_BTV


def layer_params(
    params: Mapping[str, Array], i: int, config: LlamaConfig, ops: Ops = reference_ops
) -> dict[str, Array]:
    """Return layer ``i``'s parameters, by their names below ``model.layers.{i}.``."""
    return {
        name: ops.read(params, f"model.layers.{i}.{name}", config) for name in layer_shapes(config)
    }


def block(
    layer: Mapping[str, Array],
    x_BTD: Array,
    config: LlamaConfig,
    tables: tuple[Array, Array],
    mask_BTS: Array,
    past: tuple[Array, Array] | None,
    trace: Trace = no_trace,
    ops: Ops = reference_ops,
) -> tuple[Array, tuple[Array, Array]]:
    """Apply one pre-norm residual block: ``x' = x + Attn(norm(x)), y = x' + FFN(norm(x'))``.

    Returns y [B, T, D] and the layer's keys and values, each [B, N, S, K]. ``tables`` are the
    rotation's cos and sin, each [B, T, K / 2]; ``past`` has the cached keys and values.
    """
    h_BTD = ops.rms_norm(x_BTD, layer["input_layernorm.weight"], config.norm_eps)
    trace("attn_norm", h_BTD)
    h_BTD, present = attention(layer, h_BTD, config, tables, mask_BTS, past, trace, ops)
    x_BTD = ops.add(x_BTD, h_BTD)
    trace("attn_residual", x_BTD)
    h_BTD = ops.rms_norm(x_BTD, layer["post_attention_layernorm.weight"], config.norm_eps)
    trace("ffn_norm", h_BTD)
    x_BTD = ops.add(x_BTD, feed_forward(layer, h_BTD, trace, ops))
    trace("residual", x_BTD)
    return x_BTD, present


def attention(
    layer: Mapping[str, Array],
    h_BTD: Array,
    config: LlamaConfig,
    tables: tuple[Array, Array],
    mask_BTS: Array,
    past: tuple[Array, Array] | None,
    trace: Trace,
    ops: Ops,
) -> tuple[Array, tuple[Array, Array]]:
    """Compute ``softmax(q k^T / sqrt(K)) v W_o^T`` with shared key/value heads: [B, T, D].

    Returns it and the extended keys and values, each [B, N, S, K] (Vaswani et al. 2017, eq. 1;
    Ainslie et al. 2023). q, k and v are h times W_q^T, W_k^T and W_v^T; q and k are rotated.
    """
    q_BTHK, k_BTNK, v_BTNK = (
        ops.split_heads(ops.linear(h_BTD, layer[f"self_attn.{name}_proj.weight"]), config.head_dim)
        for name in "qkv"
    )
    for name, value in (("q", q_BTHK), ("k", k_BTNK), ("v", v_BTNK)):
        trace(name, value)
    q_BTHK, k_BTNK = ops.apply_rope(q_BTHK, *tables), ops.apply_rope(k_BTNK, *tables)
    trace("q_rope", q_BTHK)
    trace("k_rope", k_BTNK)
    k_BNSK, v_BNSK = k_BTNK.swapaxes(1, 2), v_BTNK.swapaxes(1, 2)
    if past is not None:
        k_BNSK, v_BNSK = ops.extend(past[0], k_BNSK), ops.extend(past[1], v_BNSK)
    scores_BNRTS = ops.attention_scores(ops.group_queries(q_BTHK, config.n_kv_heads), k_BNSK)
    weights_BNRTS = ops.masked_softmax(scores_BNRTS, mask_BTS)
    mixed_BTHK = ops.ungroup_queries(ops.attention_mix(weights_BNRTS, v_BNSK))
    trace("attn", mixed_BTHK)
    out_BTD = ops.linear(ops.merge_heads(mixed_BTHK), layer["self_attn.o_proj.weight"])
    trace("attn_proj", out_BTD)
    return out_BTD, (k_BNSK, v_BNSK)


def feed_forward(layer: Mapping[str, Array], h_BTD: Array, trace: Trace, ops: Ops) -> Array:
    """Compute ``(silu(h W_g^T) * (h W_u^T)) W_d^T``: [B, T, D] -> the same (Shazeer 2020)."""
    gate_BTF = ops.linear(h_BTD, layer["mlp.gate_proj.weight"])
    up_BTF = ops.linear(h_BTD, layer["mlp.up_proj.weight"])
    trace("gate", gate_BTF)
    trace("up", up_BTF)
    hidden_BTF = ops.swiglu(gate_BTF, up_BTF)
    trace("ffn", hidden_BTF)
    out_BTD: Array = ops.linear(hidden_BTF, layer["mlp.down_proj.weight"])
    trace("ffn_proj", out_BTD)
    return out_BTD


def _prefixed(trace: Trace, prefix: str) -> Trace:
    return trace if trace is no_trace else lambda name, value: trace(prefix + name, value)


def fill_and_check_inputs(
    tokens: Array,
    positions: Array | None,
    mask: Array | None,
    start: int,
    config: LlamaConfig,
    ops: Ops = reference_ops,
) -> tuple[Array, Array]:
    """Return positions [B or 1, T] and mask [B or 1, T, S], filled in where they are None.

    The default positions follow ``start`` cached tokens, the default mask is causal. Raises
    InputError as ``check_inputs`` does.
    """
    check_inputs(tokens, positions, mask, start, config)
    length = tokens.shape[1]
    if positions is None:
        positions = ops.next_positions(length, start)[None]
    if mask is None:
        mask = ops.causal_mask(length, start + length)[None]
    check_inputs(tokens, positions, mask, start, config)
    return positions, mask


def check_inputs(
    tokens: Array, positions: Array | None, mask: Array | None, start: int, config: LlamaConfig
) -> None:
    """Raise InputError for token ids outside the vocabulary, and for a wrong shape or dtype.

    It makes nothing that is larger than the arguments; a causal mask is the square of its tokens.
    """
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise InputError(
            f"tokens must be non-empty integers [B, T], got {tokens.dtype} {tokens.shape}"
        )
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}")
    batch, length = tokens.shape
    for name, value, shape, kind in (
        ("positions", positions, (length,), np.integer),
        ("mask", mask, (length, start + length), np.bool_),
    ):
        if value is None:
            continue
        fits = value.shape[1:] == shape and value.shape[0] in (1, batch)
        if not (fits and np.issubdtype(value.dtype, kind)):
            raise InputError(
                f"{name} must be {kind.__name__} {(batch, *shape)}, got {value.dtype} {value.shape}"
            )
