"""Porting bugs planted in torch: a compact Llama whose every operation can be replaced.

It shares nothing with llama_torch or with the oracle's own mutants, so that a diagnosis made
with those has something independent to name. Each bug is written as a porter would write it;
everything around it stays right.

Axes: B batch, T query position (this call's tokens), S key position (cache and this call),
D dim, H query heads, N key/value heads, K head_dim, F hidden_dim, V vocabulary.
"""

import dataclasses
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
Note = Callable[[str, Tensor], None]
Operation = Callable[..., Any]


# The honest operations.


def read(params: Params, name: str, config: LlamaConfig) -> Tensor:
    """Read one parameter by its Hugging Face name; a tied head is the embedding itself."""
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
    """theta^(-2i/K) in float64, scaled as the config says: [K / 2]."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    return scaled(config.rope_theta ** -(pairs / config.head_dim), config)


def scaled(frequencies: Tensor, config: LlamaConfig) -> Tensor:
    if config.rope_type == "default":
        return frequencies
    slow = frequencies / config.rope_factor
    if config.rope_type == "linear":
        return slow
    wave = 2 * math.pi / frequencies
    longest = config.rope_original_max_seq_len / config.rope_low_freq_factor
    shortest = config.rope_original_max_seq_len / config.rope_high_freq_factor
    # Between the two, the share kept falls linearly with 1 / wave.
    share = (1 / wave - 1 / longest) / (1 / shortest - 1 / longest)
    mixed = torch.where(wave > longest, slow, share * frequencies + (1 - share) * slow)
    return torch.where(wave < shortest, frequencies, mixed)


def cos_sin(positions_BT: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tables:
    """Both tables [B, T, 1, K / 2], computed in the frequencies' precision and rounded once."""
    angles = positions_BT[..., None, None].to(frequencies.dtype) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_tables(positions_BT: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    return cos_sin(positions_BT, rope_frequencies(config), dtype)


def apply_rope(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotate-half form: pairs (i, i + K / 2)."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def repeat_kv(x_BNSK: Tensor, n_rep: int) -> Tensor:
    """One key/value head for every query head, h // n_rep for head h: [B, H, S, K]."""
    return x_BNSK.repeat_interleave(n_rep, dim=1)


def attention_scores(q_BHTK: Tensor, k_BHSK: Tensor) -> Tensor:
    return q_BHTK @ k_BHSK.transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])


def masked_softmax(scores_BHTS: Tensor, mask_BTS: Tensor) -> Tensor:
    """Attention weights [B, H, T, S]; a query that may attend to nothing gets zeros."""
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
    """The residual stream plus a sublayer's output."""
    return x_BTD + h_BTD


def extend(past_BNSK: Tensor, new_BNTK: Tensor) -> Tensor:
    """Append this call's keys or values to the cached ones."""
    return torch.cat([past_BNSK, new_BNTK], dim=2)


def next_positions(length: int, start: int) -> Tensor:
    """Positions [T] of ``length`` tokens that follow ``start`` cached ones."""
    return torch.arange(start, start + length)


def causal_mask(n_queries: int, n_keys: int) -> Tensor:
    """The causal default [T, S]: the last query lines up with the last key."""
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
    note: Note,
    ops: SimpleNamespace,
) -> tuple[Tensor, Cache]:
    """Logits [B, T, V] and the longer cache; positions [B, T] and mask [B, T, S] have defaults."""
    length, start = tokens_BT.shape[1], cache[0][0].shape[2] if cache else 0
    if positions is None:
        positions = ops.next_positions(length, start)[None]
    if mask is None:
        mask = ops.causal_mask(length, start + length)[None]
    x = ops.embed(ops.read(params, EMBED, config), tokens_BT)
    note("embed", x)
    tables = ops.rope_tables(positions, config, x.dtype)
    heads, presents = (-1, config.head_dim), []
    for i in range(config.n_layers):

        def weight(name: str, i: int = i) -> Tensor:
            return ops.read(params, f"model.layers.{i}.{name}.weight", config)

        def say(name: str, value: Tensor, i: int = i) -> Tensor:
            note(f"layers.{i}.{name}", value)
            return value

        h = say("attn_norm", ops.rms_norm(x, weight("input_layernorm"), config.norm_eps))
        q_BTHK, k_BTNK, v_BTNK = (
            say(n, ops.linear(h, weight(f"self_attn.{n}_proj")).unflatten(-1, heads)) for n in "qkv"
        )
        q = say("q_rope", ops.apply_rope(q_BTHK, *tables)).transpose(1, 2)
        k = say("k_rope", ops.apply_rope(k_BTNK, *tables)).transpose(1, 2)
        v = v_BTNK.transpose(1, 2)
        if cache:
            k, v = ops.extend(cache[i][0], k), ops.extend(cache[i][1], v)
        presents.append((k, v))
        scores = ops.attention_scores(q, ops.repeat_kv(k, config.n_rep))
        weights = ops.masked_softmax(scores, mask)
        mixed_BHTK = ops.attention_mix(weights, ops.repeat_kv(v, config.n_rep))
        mixed_BTHK = say("attn", mixed_BHTK.transpose(1, 2))
        h = ops.linear(ops.merge_heads(mixed_BTHK), weight("self_attn.o_proj"))
        x = say("attn_residual", ops.add(x, say("attn_proj", h)))
        h = say("ffn_norm", ops.rms_norm(x, weight("post_attention_layernorm"), config.norm_eps))
        gate = say("gate", ops.linear(h, weight("mlp.gate_proj")))
        up = say("up", ops.linear(h, weight("mlp.up_proj")))
        h = ops.linear(say("ffn", ops.swiglu(gate, up)), weight("mlp.down_proj"))
        x = say("residual", ops.add(x, say("ffn_proj", h)))
    x = ops.rms_norm(x, ops.read(params, NORM, config), config.norm_eps)
    note("norm", x)
    logits = ops.linear(x, ops.read(params, LM_HEAD, config))
    note("logits", logits)
    return logits, presents


class Planted:
    """The model with one bug of BUGS, or with none, behind the protocol of backends."""

    dtypes = ("float64", "float32")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.ops = SimpleNamespace(**{**OPERATIONS, **(BUGS[name] if name else {})})

    def logits(self, *arguments: Any) -> Array:
        return self.traced_decode(*arguments)[0]["logits"]

    def decode(self, *arguments: Any) -> tuple[Array, Cache]:
        found, cache = self.traced_decode(*arguments)
        return found["logits"], cache

    def trace(self, *arguments: Any) -> dict[str, Array]:
        return self.traced_decode(*arguments)[0]

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None = None,
    ) -> tuple[dict[str, Array], Cache]:
        """Every activation of a call that continues ``cache``, and the longer cache."""
        found: dict[str, Array] = {}
        at, see = (None if x is None else torch.from_numpy(np.array(x)) for x in (positions, mask))
        ids = torch.from_numpy(np.array(tokens))

        def note(name: str, value: Tensor) -> None:
            found[name] = value.numpy()

        with torch.no_grad():
            cache = forward(config, params, ids, at, see, cache, note, self.ops)[1]
        return found, cache


# The bugs too long for the table below.


def to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Hugging Face's conversion: each head's rows from (pair, half) to (half, pair) order."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse: back to Meta's order, each pair's two rows together."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def weights_unpermuted(params: Params, name: str, config: LlamaConfig) -> Tensor:
    weight = read(params, name, config)
    if name.endswith("q_proj.weight"):
        return to_pairs(weight, config.n_heads)
    if name.endswith("k_proj.weight"):
        return to_pairs(weight, config.n_kv_heads)
    return weight


def k_permuted_as_q(params: Params, name: str, config: LlamaConfig) -> Tensor:
    weight = read(params, name, config)
    if name.endswith("k_proj.weight") and weight.shape[0] % (2 * config.n_heads) == 0:
        return to_halves(to_pairs(weight, config.n_kv_heads), config.n_heads)
    return weight


def tied_head_random(params: Params, name: str, config: LlamaConfig) -> Tensor:
    weight = read(params, name, config)
    if name == LM_HEAD and config.tie_embeddings:  # not in the file, so left as initialised
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(weight.shape, generator=generator) * 0.02).to(weight)
    return weight


def tf32(x: Tensor) -> Tensor:
    """Round to 10 explicit mantissa bits: to nearest, ties to even."""
    bits = x.float().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).to(x)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x)


def products(low: Operation) -> dict[str, Operation]:
    """Every matrix product of the model, its inputs rounded."""

    def rounded(product: Operation) -> Operation:
        return lambda a, b: product(low(a), low(b))

    made = (linear, attention_scores, attention_mix)
    return {product.__name__: rounded(product) for product in made}


def lower(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else torch.bfloat16


def norm_low_precision(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(mean_square(x.to(lower(x.dtype))).to(x) + eps))


def rope_frequencies_bf16(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    kept = rope_frequencies(config).bfloat16()  # a buffer that model.bfloat16() cast
    return cos_sin(at, kept.double(), dtype)


def rope_angles_float32(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    pairs = torch.arange(0, config.head_dim, 2).float()
    inv_freq = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    return cos_sin(at, scaled(inv_freq, config), dtype)


def rope_frequencies_not_doubled(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float64)
    return cos_sin(at, scaled(config.rope_theta ** (-pairs / config.head_dim), config), dtype)


def rope_decode_tables(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    return (rope_theta_ignored if at.shape[1] == 1 else rope_tables)(at, config, dtype)


def rope_theta_ignored(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    return rope_tables(at, dataclasses.replace(config, rope_theta=1e4), dtype)


def rope_scaling_ignored(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    return cos_sin(at, config.rope_theta ** (-pairs / config.head_dim), dtype)


def rope_scaling_uniform(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    factor = 1.0 if config.rope_type == "default" else config.rope_factor
    return rope_scaling_ignored(at / factor, config, dtype)


def rope_scaling_unsmoothed(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    if config.rope_type != "llama3":
        return rope_tables(at, config, dtype)
    plain = rope_frequencies(dataclasses.replace(config, rope_type="default"))
    turns = plain * config.rope_original_max_seq_len / (2 * math.pi)
    slow = turns <= config.rope_low_freq_factor
    return cos_sin(at, torch.where(slow, plain / config.rope_factor, plain), dtype)


def left_padding_in_positions(at: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    columns = torch.arange(1 - at.shape[1], 1) + at.max()  # the same for every row
    return rope_tables(columns.expand_as(at), config, dtype)


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def rope_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([second, -first], dim=-1)  # the sign on the wrong half
    return x * torch.cat([cos, cos], dim=-1) + rotated * torch.cat([sin, sin], dim=-1)


def softmax_low_precision(scores: Tensor, mask: Tensor) -> Tensor:
    return masked_softmax(scores.to(lower(scores.dtype)), mask).to(scores)


def cache_trimmed(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past[:, :, :-1], torch.zeros_like(past[:, :, -1:]), new], dim=2)


_BY_OPERATION: dict[str, dict[str, Operation]] = {
    "read": {
        "weights_unpermuted": weights_unpermuted,
        "k_permuted_as_q": k_permuted_as_q,
        "head_from_embedding": lambda p, name, c: read(p, EMBED if name == LM_HEAD else name, c),
        "tied_head_random": tied_head_random,
    },
    "rms_norm": {
        "norm_eps_tenth": lambda x, w, eps: rms_norm(x, w, eps / 10),
        "norm_eps_outside": lambda x, w, eps: w * (x / (mean_square(x).sqrt() + eps)),
        "norm_inverted": lambda x, w, eps: w * (x * torch.sqrt(mean_square(x) + eps)),
        "norm_variance": lambda x, w, eps: (
            w * (x * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps))
        ),
        "norm_low_precision": norm_low_precision,
        "norm_weight_plus_one": lambda x, w, eps: rms_norm(x, 1 + w, eps),
    },
    "rope_tables": {
        "rope_tables_bf16": lambda at, config, dtype: tuple(
            table.to(dtype) for table in rope_tables(at, config, torch.bfloat16)
        ),
        "rope_frequencies_bf16": rope_frequencies_bf16,
        "rope_positions_bf16": lambda at, *rest: rope_tables(at.bfloat16(), *rest),
        "rope_angles_float32": rope_angles_float32,
        "rope_theta_ignored": rope_theta_ignored,
        "rope_scaling_ignored": rope_scaling_ignored,
        "rope_scaling_uniform": rope_scaling_uniform,
        "rope_scaling_unsmoothed": rope_scaling_unsmoothed,
        "rope_frequencies_not_doubled": rope_frequencies_not_doubled,
        "rope_decode_tables": rope_decode_tables,
        "left_padding_in_positions": left_padding_in_positions,
    },
    "apply_rope": {"rope_interleaved": rope_interleaved, "rope_backwards": rope_backwards},
    "repeat_kv": {"kv_heads_tiled": lambda x, n_rep: x.repeat(1, n_rep, 1, 1)},
    "attention_scores": {
        "scores_unscaled": lambda q, k: q @ k.mT,
        "scores_scaled_by_width": lambda q, k: q @ k.mT / q.shape[-1],
    },
    "masked_softmax": {
        "softmax_low_precision": softmax_low_precision,
        "softmax_before_mask": lambda scores, mask: scores.softmax(-1) * mask[:, None],
    },
    "merge_heads": {"heads_transposed": lambda x: x.transpose(2, 3).flatten(2)},
    "swiglu": {
        "silu_on_product": lambda gate, up: F.silu(gate * up),
        "silu_on_up": lambda gate, up: gate * F.silu(up),
        "gelu_for_silu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    },
    "add": {"residual_dropped": lambda x, h: h},
    "extend": {
        "cache_first_row": lambda past, new: torch.cat([past, new[:1].expand_as(new)], dim=2),
        "cache_trimmed": cache_trimmed,
    },
    "next_positions": {
        "positions_doubled": lambda length, start: torch.arange(length) + 2 * start,
        "positions_one_more": lambda length, start: torch.arange(length) + start + (start > 0),
        "positions_from_zero": lambda length, start: torch.arange(length),
    },
    "causal_mask": {
        "mask_top_left": lambda t, s: torch.ones(t, s, dtype=torch.bool).tril(),
        "mask_forgotten": lambda t, s: torch.ones(t, s, dtype=torch.bool),
    },
}
# Each bug's name to the operations that it replaces, and what by.
BUGS: dict[str, dict[str, Operation]] = {
    name: {operation: bug}
    for operation, bugs in _BY_OPERATION.items()
    for name, bug in bugs.items()
}
BUGS |= {"matmul_tf32": products(tf32), "matmul_bf16": products(bf16)}
# Each planted port by its bug's name, for ``compare.py --against parity_tests.planted:bug.NAME``.
bug = SimpleNamespace(**{name: Planted(name) for name in BUGS})
