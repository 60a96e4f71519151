"""Known porting bugs of the forward pass, each as one replaced operation of ops.

A mutant is a bug of a published port (its citation names the report) or a common slip.
``forward(..., ops=mutant.apply(ops))`` is the whole model with that one bug in it. The bugs of
training code are in training_mutants.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from . import ops
from .config import LlamaConfig
from .naming import EMBED, LM_HEAD
from .ops import Array

Tables = tuple[Array, Array]
# Citations of bugs without a report.
COMMON_SLIP = "a common slip"
DERIVATION_SLIP = "a slip in deriving it by hand"


class Mutant(NamedTuple):
    """One bug, as the replacement of one operation of ops, grad or optim."""

    name: str
    sentence: str  # what the bug does
    citation: str  # reports of it
    operation: str  # the name of the replaced operation
    replacement: Callable[..., Any]  # of the same signature
    # Further replacements by name: an operation's inverse, or all others of its kind.
    also: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    # The property of the error that is equal in every port with the bug, by which it is known:
    # mostly the "value". Roundings differ in their details and leave the "size" of the error; a
    # random weight leaves "nothing": the values are unrelated to the right ones.
    known_by: str = "value"

    def apply(self, reference: ModuleType | SimpleNamespace) -> SimpleNamespace:
        """Return the operations of ``reference`` with this bug, if the replaced one is among them.

        ``reference`` is ops, grad.REFERENCE_VJPS or optim.REFERENCE_RULES.
        """
        operations = dict(vars(reference))
        if self.operation in operations:
            operations |= {self.operation: self.replacement, **self.also}
        return SimpleNamespace(**operations)


def round_bits(x: Array, bits: int) -> Array:
    """Round to ``bits`` significant bits, ties to even: 8 for bfloat16, 11 for TF32 and float16."""
    mantissa, exponent = np.frexp(x)
    rounded: Array = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return rounded.astype(x.dtype, copy=False)


def _lower(x: Array) -> Array:
    """Round to the next precision below the array's own."""
    return round_bits(x, 24 if x.dtype == np.float64 else 8)


# Weights.


def _permute(weight: Array, heads: int, to_halves: bool) -> Array:
    """Reorder each head's rows between neighbouring pairs and halves."""
    rows, width = weight.shape
    shape = (heads, -1, 2, width) if to_halves else (heads, 2, -1, width)
    return weight.reshape(shape).swapaxes(1, 2).reshape(rows, width)


def _read_k_as_q(params: Mapping[str, Array], name: str, config: LlamaConfig) -> Array:
    weight = ops.read(params, name, config)
    if "k_proj" in name and len(weight) % (2 * config.n_heads) == 0:
        weight = _permute(_permute(weight, config.n_kv_heads, False), config.n_heads, True)
    return weight


def _read_unpermuted(params: Mapping[str, Array], name: str, config: LlamaConfig) -> Array:
    weight = ops.read(params, name, config)
    if "q_proj" in name or "k_proj" in name:
        weight = _permute(weight, len(weight) // config.head_dim, False)
    return weight


def _read_head_from_embedding(params: Mapping[str, Array], name: str, config: LlamaConfig) -> Array:
    return params[EMBED if name == LM_HEAD else name]


def _read_random_head(params: Mapping[str, Array], name: str, config: LlamaConfig) -> Array:
    weight = ops.read(params, name, config)
    if name == LM_HEAD and config.tie_embeddings:
        random = np.random.default_rng(0).standard_normal(weight.shape)
        weight = (0.02 * random).astype(weight.dtype)
    return weight


# RMSNorm.


def _norm_small_eps(x: Array, w: Array, eps: float) -> Array:
    return ops.rms_norm(x, w, eps / 10)


def _norm_eps_outside(x: Array, w: Array, eps: float) -> Array:
    y: Array = x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * w
    return y


def _norm_inverted(x: Array, w: Array, eps: float) -> Array:
    y: Array = x * np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w
    return y


def _norm_variance(x: Array, w: Array, eps: float) -> Array:
    y: Array = x / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * w
    return y


def _norm_low(x: Array, w: Array, eps: float) -> Array:
    y: Array = x / np.sqrt(np.mean(_lower(x * x), axis=-1, keepdims=True) + eps) * w
    return y


def _norm_weight_plus_one(x: Array, w: Array, eps: float) -> Array:
    return ops.rms_norm(x, 1.0 + w, eps)


# RoPE.


def _rope_interleaved(x: Array, cos: Array, sin: Array) -> Array:
    halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    rotated = np.split(ops.apply_rope(halves, cos, sin), 2, axis=-1)
    return np.stack(rotated, axis=-1).reshape(x.shape)


def _rope_backwards(x: Array, cos: Array, sin: Array) -> Array:
    return ops.apply_rope(x, cos, -sin)


def _tables(positions: Array, frequencies: Array, dtype: DTypeLike) -> Tables:
    angles = positions[..., None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _tables_bf16(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    cos, sin = ops.rope_tables(positions, config, dtype)
    return round_bits(cos, 8), round_bits(sin, 8)


def _frequencies_bf16(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    return _tables(positions, round_bits(ops.rope_frequencies(config), 8), dtype)


def _positions_bf16(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    rounded = round_bits(positions.astype(np.float64), 8)
    return _tables(rounded, ops.rope_frequencies(config), dtype)


def _angles_float32(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    frequencies = ops.rope_frequencies(config).astype(np.float32)
    return _tables(positions.astype(np.float32), frequencies, dtype)


def _theta_ignored(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    return ops.rope_tables(positions, replace(config, rope_theta=10_000.0), dtype)


def _frequencies_not_doubled(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    return _tables(positions, np.sqrt(ops.rope_frequencies(config)), dtype)


def _decode_tables(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    decoding = positions.shape[1] == 1
    return (_theta_ignored if decoding else ops.rope_tables)(positions, config, dtype)


def _scaling_ignored(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    return ops.rope_tables(positions, replace(config, rope_type="default"), dtype)


def _scaling_uniform(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    linear = config if config.rope_type == "default" else replace(config, rope_type="linear")
    return ops.rope_tables(positions, linear, dtype)


def _scaling_unsmoothed(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    low = config.rope_low_freq_factor  # nothing in between: scaled wholly or not at all
    unsmoothed = replace(config, rope_high_freq_factor=low * (1 + 1e-12))
    return ops.rope_tables(positions, unsmoothed, dtype)


def _columns(positions: Array, config: LlamaConfig, dtype: DTypeLike) -> Tables:
    length = positions.shape[1]
    column = positions.max() - length + 1 + np.arange(length)
    return ops.rope_tables(np.broadcast_to(column, positions.shape), config, dtype)


# Positions, masks and the cache.


def _positions_doubled(length: int, start: int) -> Array:
    return ops.next_positions(length, 2 * start)


def _positions_one_more(length: int, start: int) -> Array:
    return ops.next_positions(length, start + 1 if start else 0)


def _positions_from_zero(length: int, start: int) -> Array:
    return ops.next_positions(length, 0)


def _mask_top_left(n_queries: int, n_keys: int) -> Array:
    return np.tril(np.ones((n_queries, n_keys), dtype=bool))


def _mask_all(n_queries: int, n_keys: int) -> Array:
    return np.ones((n_queries, n_keys), dtype=bool)


def _mask_next_seen(n_queries: int, n_keys: int) -> Array:
    return np.tril(_mask_all(n_queries, n_keys), n_keys - n_queries + 1)


def _mask_itself_hidden(n_queries: int, n_keys: int) -> Array:
    return np.tril(_mask_all(n_queries, n_keys), n_keys - n_queries - 1)


def _extend_first_row(past: Array, new: Array) -> Array:
    return ops.extend(past, np.broadcast_to(new[:1], new.shape))


def _extend_trimmed(past: Array, new: Array) -> Array:
    kept = past.copy()
    kept[:, :, -1] = 0.0
    return ops.extend(kept, new)


# Attention.


def _group_tiled(q: Array, n_kv_heads: int) -> Array:
    batch, length, _, width = q.shape
    return q.reshape(batch, length, -1, n_kv_heads, width).transpose(0, 3, 2, 1, 4)


def _ungroup_tiled(x: Array) -> Array:
    batch, groups, repeats, length, width = x.shape
    return x.transpose(0, 3, 2, 1, 4).reshape(batch, length, groups * repeats, width)


def _merge_transposed(x: Array) -> Array:
    return ops.merge_heads(x.swapaxes(-1, -2))


def _scores_unscaled(q: Array, k: Array) -> Array:
    return ops.attention_scores(q, k) * math.sqrt(q.shape[-1])


def _scores_scaled_by_width(q: Array, k: Array) -> Array:
    return ops.attention_scores(q, k) / math.sqrt(q.shape[-1])


def _softmax_low(scores: Array, mask: Array) -> Array:
    return _lower(ops.masked_softmax(_lower(scores), mask))


def _softmax_before_mask(scores: Array, mask: Array) -> Array:
    weights = ops.masked_softmax(scores, np.ones_like(mask))
    return weights * mask[:, None, None]


# Feed-forward, residual stream, matrix products.


def _silu_on_product(gate: Array, up: Array) -> Array:
    return ops.silu(gate * up)


def _silu_on_up(gate: Array, up: Array) -> Array:
    return gate * ops.silu(up)


def _gelu(gate: Array, up: Array) -> Array:
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
    y: Array = 0.5 * gate * (1.0 + np.tanh(inner)) * up
    return y


def _residual_dropped(x: Array, h: Array) -> Array:
    return h


def _with_inputs(bits: int) -> dict[str, Callable[..., Array]]:
    """Return the model's matrix products by name, their inputs rounded to ``bits``."""

    def rounded(product: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
        return lambda a, b: product(round_bits(a, bits), round_bits(b, bits))

    products = (ops.linear, ops.attention_scores, ops.attention_mix)
    return {product.__name__: rounded(product) for product in products}


_TF32, _BF16 = _with_inputs(11), _with_inputs(8)


FORWARD = (
    Mutant(
        "rope_interleaved",
        "interleaved RoPE on weights stored for the half-split form",
        "transformers#25199, llama2.c#286",
        "apply_rope",
        _rope_interleaved,
    ),
    Mutant(
        "weights_unpermuted",
        "half-split RoPE on weights left in the interleaved order",
        "nanotron#427",
        "read",
        _read_unpermuted,
    ),
    Mutant(
        "k_permuted_as_q",
        "k_proj permuted with the number of query heads",
        "llama.cpp#3364, transformers#31788",
        "read",
        _read_k_as_q,
    ),
    Mutant(
        "kv_heads_tiled",
        "key/value heads tiled instead of repeated: query head h reads h % N, not h // R",
        "onnx#7274, axlearn#842",
        "group_queries",
        _group_tiled,
        {"ungroup_queries": _ungroup_tiled},
    ),
    Mutant(
        "heads_transposed",
        "heads and their width swapped before o_proj",
        "nntile#347",
        "merge_heads",
        _merge_transposed,
    ),
    Mutant(
        "norm_eps_tenth",
        "a norm epsilon ten times too small (1e-6 for 1e-5)",
        "llama.cpp#2373, llama#771",
        "rms_norm",
        _norm_small_eps,
    ),
    Mutant(
        "norm_eps_outside",
        "the norm's epsilon added outside the square root",
        "OLMo#281, TransformerEngine#364",
        "rms_norm",
        _norm_eps_outside,
    ),
    Mutant(
        "norm_inverted",
        "the norm multiplies by the root mean square (divides by rsqrt)",
        "llm-foundry#371",
        "rms_norm",
        _norm_inverted,
    ),
    Mutant(
        "norm_variance",
        "variance about the mean for mean square",
        "keras#22393",
        "rms_norm",
        _norm_variance,
    ),
    Mutant(
        "norm_low_precision",
        "the norm squares in a lower precision than the model's",
        "minimind#301, keras-hub#1532",
        "rms_norm",
        _norm_low,
        known_by="size",
    ),
    Mutant(
        "norm_weight_plus_one",
        "norm weights read as offsets from one, as Gemma stores them",
        COMMON_SLIP,
        "rms_norm",
        _norm_weight_plus_one,
    ),
    Mutant(
        "rope_backwards", "the rotation runs backwards", COMMON_SLIP, "apply_rope", _rope_backwards
    ),
    Mutant(
        "rope_tables_bf16",
        "RoPE's cos and sin kept in bfloat16",
        "transformers#29285",
        "rope_tables",
        _tables_bf16,
        known_by="size",
    ),
    Mutant(
        "rope_frequencies_bf16",
        "RoPE's inverse frequencies kept in bfloat16",
        "transformers#25681",
        "rope_tables",
        _frequencies_bf16,
        known_by="size",
    ),
    Mutant(
        "rope_positions_bf16",
        "positions kept in bfloat16: 257 becomes 256",
        "gpt-neox#1016",
        "rope_tables",
        _positions_bf16,
        known_by="size",
    ),
    Mutant(
        "rope_angles_float32",
        "angles multiplied in float32: 4e-3 radians off at position 65,536",
        "the common implementations, by design",
        "rope_tables",
        _angles_float32,
        known_by="size",
    ),
    Mutant(
        "rope_theta_ignored",
        "theta is 10,000 whatever the config says",
        "airllm#368, penzai#102",
        "rope_tables",
        _theta_ignored,
    ),
    Mutant(
        "rope_frequencies_not_doubled",
        "frequencies theta^(-i/K) instead of theta^(-2i/K)",
        COMMON_SLIP,
        "rope_tables",
        _frequencies_not_doubled,
    ),
    Mutant(
        "rope_scaling_ignored",
        "rope_scaling in the config is ignored",
        "mlx-vlm#1710, vllm#1956",
        "rope_tables",
        _scaling_ignored,
    ),
    Mutant(
        "rope_scaling_uniform",
        "llama3 scaling divides every frequency, as linear scaling does",
        COMMON_SLIP,
        "rope_tables",
        _scaling_uniform,
    ),
    Mutant(
        "rope_scaling_unsmoothed",
        "llama3 scaling without the passage between its two thresholds",
        COMMON_SLIP,
        "rope_tables",
        _scaling_unsmoothed,
    ),
    Mutant(
        "rope_decode_tables",
        "other RoPE tables in decoding than in prefill",
        "mlir-air#1948",
        "rope_tables",
        _decode_tables,
    ),
    Mutant(
        "left_padding_in_positions",
        "positions count left padding: every row gets its column numbers",
        "transformers#33095, unsloth#3795",
        "rope_tables",
        _columns,
    ),
    Mutant(
        "positions_doubled",
        "decoding starts at twice the prompt's length",
        "tiny-llm#46",
        "next_positions",
        _positions_doubled,
    ),
    Mutant(
        "positions_one_more",
        "decoding starts one position late",
        "flash-linear-attention#766",
        "next_positions",
        _positions_one_more,
    ),
    Mutant(
        "positions_from_zero",
        "decoding starts again at position 0",
        "mlx-vlm#1993",
        "next_positions",
        _positions_from_zero,
    ),
    Mutant(
        "mask_top_left",
        "the causal mask aligned top-left although there are more keys than queries",
        "pytorch#108108, pytorch#144858, onnx#8068",
        "causal_mask",
        _mask_top_left,
    ),
    Mutant("mask_forgotten", "no causal mask", COMMON_SLIP, "causal_mask", _mask_all),
    Mutant(
        "mask_next_seen",
        "the causal mask is off by one: each token attends to the next one too",
        COMMON_SLIP,
        "causal_mask",
        _mask_next_seen,
    ),
    Mutant(
        "mask_itself_hidden",
        "the causal mask is off by one: no token attends to itself",
        "former#10",
        "causal_mask",
        _mask_itself_hidden,
    ),
    Mutant(
        "cache_first_row",
        "the cache stores the first row's keys and values for every row of a batch",
        "mlx-lm#1457",
        "extend",
        _extend_first_row,
    ),
    Mutant(
        "cache_trimmed",
        "the cache loses its newest entry: trimmed by a padded length",
        "mlx-lm#1673",
        "extend",
        _extend_trimmed,
    ),
    Mutant(
        "scores_unscaled",
        "attention scores without 1/sqrt(K)",
        COMMON_SLIP,
        "attention_scores",
        _scores_unscaled,
    ),
    Mutant(
        "scores_scaled_by_width",
        "attention scores divided by K instead of sqrt(K)",
        COMMON_SLIP,
        "attention_scores",
        _scores_scaled_by_width,
    ),
    Mutant(
        "softmax_low_precision",
        "softmax in a lower precision than the model's",
        "axlearn#18, ipex-llm#10481",
        "masked_softmax",
        _softmax_low,
        known_by="size",
    ),
    Mutant(
        "softmax_before_mask",
        "the mask multiplies the weights after softmax: they no longer sum to one",
        COMMON_SLIP,
        "masked_softmax",
        _softmax_before_mask,
    ),
    Mutant(
        "silu_on_product",
        "SiLU on the product of gate and up",
        "breakdown-minimind#3",
        "swiglu",
        _silu_on_product,
    ),
    Mutant("silu_on_up", "SiLU on up instead of gate", "mlx-lm#767", "swiglu", _silu_on_up),
    Mutant("gelu_for_silu", "GELU (tanh form) for SiLU", COMMON_SLIP, "swiglu", _gelu),
    Mutant(
        "residual_dropped",
        "a residual connection is missing",
        COMMON_SLIP,
        "add",
        _residual_dropped,
    ),
    Mutant(
        "head_from_embedding",
        "lm_head overwritten by the embeddings",
        "DeepSpeed#4088",
        "read",
        _read_head_from_embedding,
    ),
    Mutant(
        "tied_head_random",
        "a tied head left at its random initialisation",
        "transformers#43429",
        "read",
        _read_random_head,
        known_by="nothing",
    ),
    Mutant(
        "matmul_tf32",
        "matrix products with TF32 inputs",
        "jax#18934",
        "linear",
        _TF32["linear"],
        _TF32,
        known_by="size",
    ),
    Mutant(
        "matmul_bf16",
        "matrix products with bfloat16 inputs",
        "jax#10413",
        "linear",
        _BF16["linear"],
        _BF16,
        known_by="size",
    ),
)
