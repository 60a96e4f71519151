"""The operations of a compact Llama in torch, each of which can be replaced.

Axes: B batch, T query position (this call's tokens), S key position (cache and this call),
D dim, H query heads, N key/value heads, K head_dim, F hidden_dim, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from reference_np.config import LlamaConfig
from reference_np.naming import EMBED, LM_HEAD, NORM

Array = NDArray[Any]

Params = Mapping[str, Array]

Tables = tuple[Tensor, Tensor]

Cache = list[tuple[Tensor, Tensor]]  # each layer's rotated keys and values [B, N, S, K]

Trace = Callable[[str, Tensor], None]

Operation = Callable[..., Any]


def read(params: Params, name: str, config: LlamaConfig) -> Tensor:
    """Return one parameter by its Hugging Face name; a tied head is the embedding."""
    if name == LM_HEAD and config.tie_embeddings:
        name = EMBED
    return torch.from_numpy(np.array(params[name]))  # a copy: torch warns of read-only arrays


def embed(weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.embedding(tokens_BT, weight_VD)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D * (x * torch.rsqrt(mean_square(x) + eps))


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Return theta^(-2i/K) [K / 2] in float64, scaled by the config's rope_type."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    return scaled(config.rope_theta ** -(pairs / config.head_dim), config)


def scaled(frequencies: Tensor, config: LlamaConfig) -> Tensor:
    """Return the frequencies [K / 2] scaled by the config's rope_type."""
    if config.rope_type == "default":
        return frequencies
    slow = frequencies / config.rope_factor
    if config.rope_type == "linear":
        return slow
    wave = 2 * math.pi / frequencies
    longest = config.rope_original_max_seq_len / config.rope_low_freq_factor
    shortest = config.rope_original_max_seq_len / config.rope_high_freq_factor
    # Between the two wavelengths the kept fraction is linear in 1 / wave.
    kept = (1 / wave - 1 / longest) / (1 / shortest - 1 / longest)
    mixed = torch.where(wave > longest, slow, kept * frequencies + (1 - kept) * slow)
    return torch.where(wave < shortest, frequencies, mixed)


def cos_sin(positions_BT: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tables:
    """Return cos and sin [B, T, 1, K / 2], computed in the frequencies' dtype and rounded once."""
    angles = positions_BT[..., None, None].to(frequencies.dtype) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_tables(positions_BT: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    return cos_sin(positions_BT, rope_frequencies(config), dtype)


def apply_rope(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K / 2) of [B, T, H, K]: the rotate-half form."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def repeat_kv(x_BNSK: Tensor, n_rep: int) -> Tensor:
    """Return key/value head ``h // n_rep`` for every query head h: [B, N, S, K] -> [B, H, S, K]."""
    return x_BNSK.repeat_interleave(n_rep, dim=1)


def attention_scores(q_BHTK: Tensor, k_BHSK: Tensor) -> Tensor:
    return q_BHTK @ k_BHSK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])


def masked_softmax(scores_BHTS: Tensor, mask_BTS: Tensor) -> Tensor:
    """Return attention weights [B, H, T, S]; zeros for a query that may attend to no key."""
    mask = mask_BTS[:, None]
    weights = scores_BHTS.masked_fill(~mask, -math.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def attention_mix(weights_BHTS: Tensor, v_BHSK: Tensor) -> Tensor:
    return weights_BHTS @ v_BHSK


def merge_heads(x_BTHK: Tensor) -> Tensor:
    return x_BTHK.flatten(2)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    return F.silu(gate_BTF) * up_BTF


def add(x_BTD: Tensor, h_BTD: Tensor) -> Tensor:
    """Return the residual stream plus a sublayer's output, both [B, T, D]."""
    return x_BTD + h_BTD


def extend(past_BNSK: Tensor, new_BNTK: Tensor) -> Tensor:
    """Append this call's keys or values to the cached: [B, N, S + T, K]."""
    return torch.cat([past_BNSK, new_BNTK], dim=2)


def next_positions(length: int, start: int) -> Tensor:
    """Return the positions [T] of ``length`` tokens that follow ``start`` cached ones."""
    return torch.arange(start, start + length)


def causal_mask(n_queries: int, n_keys: int) -> Tensor:
    """Return the causal mask [T, S]: the last query is the last key's token."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        *(read, embed, linear, rms_norm, rope_tables, apply_rope, repeat_kv, attention_scores),
        *(masked_softmax, attention_mix, merge_heads, swiglu, add, extend),
        *(next_positions, causal_mask),
    )
}


def forward(
    config: LlamaConfig,
    params: Params,
    tokens_BT: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    cache: Cache | None,
    trace: Trace,
    ops: SimpleNamespace,
) -> tuple[Tensor, Cache]:
    """Return logits [B, T, V] and the longer cache.

    ``ops`` are the operations. Positions [B, T] follow the cache and mask [B, T, S] is causal
    where they are None.
    """
    length, start = tokens_BT.shape[1], cache[0][0].shape[2] if cache else 0
    if positions is None:
        positions = ops.next_positions(length, start)[None]
    if mask is None:
        mask = ops.causal_mask(length, start + length)[None]
    x = ops.embed(ops.read(params, EMBED, config), tokens_BT)
    trace("embed", x)
    tables = ops.rope_tables(positions, config, x.dtype)
    presents = []
    for i in range(config.n_layers):

        def weight(name: str, i: int = i) -> Tensor:
            return ops.read(params, f"model.layers.{i}.{name}.weight", config)

        def traced(name: str, value: Tensor, i: int = i) -> Tensor:
            trace(f"layers.{i}.{name}", value)
            return value

        h = traced("attn_norm", ops.rms_norm(x, weight("input_layernorm"), config.norm_eps))
        past = cache[i] if cache else None
        h, present = attention(h, weight, config, tables, mask, past, traced, ops)
        presents.append(present)
        x = traced("attn_residual", ops.add(x, traced("attn_proj", h)))
        h = traced("ffn_norm", ops.rms_norm(x, weight("post_attention_layernorm"), config.norm_eps))
        gate = traced("gate", ops.linear(h, weight("mlp.gate_proj")))
        up = traced("up", ops.linear(h, weight("mlp.up_proj")))
        h = ops.linear(traced("ffn", ops.swiglu(gate, up)), weight("mlp.down_proj"))
        x = traced("residual", ops.add(x, traced("ffn_proj", h)))
    x = ops.rms_norm(x, ops.read(params, NORM, config), config.norm_eps)
    trace("norm", x)
    logits = ops.linear(x, ops.read(params, LM_HEAD, config))
    trace("logits", logits)
    return logits, presents


def attention(
    h_BTD: Tensor,
    weight: Callable[[str], Tensor],
    config: LlamaConfig,
    tables: Tables,
    mask: Tensor,
    past: tuple[Tensor, Tensor] | None,
    traced: Callable[[str, Tensor], Tensor],
    ops: SimpleNamespace,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return one layer's attention [B, T, D], and its keys and values [B, N, S, K]."""
    heads = (-1, config.head_dim)
    q_BTHK, k_BTNK, v_BTNK = (
        traced(n, ops.linear(h_BTD, weight(f"self_attn.{n}_proj")).unflatten(-1, heads))
        for n in "qkv"
    )
    q = traced("q_rope", ops.apply_rope(q_BTHK, *tables)).transpose(1, 2)
    k = traced("k_rope", ops.apply_rope(k_BTNK, *tables)).transpose(1, 2)
    v = v_BTNK.transpose(1, 2)
    if past is not None:
        k, v = ops.extend(past[0], k), ops.extend(past[1], v)
    scores = ops.attention_scores(q, ops.repeat_kv(k, config.n_rep))
    weights = ops.masked_softmax(scores, mask)
    mixed_BHTK = ops.attention_mix(weights, ops.repeat_kv(v, config.n_rep))
    mixed_BTHK = traced("attn", mixed_BHTK.transpose(1, 2))
    return ops.linear(ops.merge_heads(mixed_BTHK), weight("self_attn.o_proj")), (k, v)
