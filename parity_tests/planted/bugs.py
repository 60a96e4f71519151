"""The planted bugs, each as replaced operations."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_np.config import LlamaConfig
from reference_np.naming import EMBED, LM_HEAD

from .operations import (
    Operation,
    Params,
    Tables,
    attention_mix,
    attention_scores,
    cos_sin,
    linear,
    masked_softmax,
    mean_square,
    read,
    rms_norm,
    rope_frequencies,
    rope_tables,
    scaled,
)

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
