"""The planted bugs by name, each as replacements of operations.

A bug that needs no more than a line is a lambda in the table at the end.
"""

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


def to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder each head's rows of a matrix [out, in] from (pair, half) to (half, pair)."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder each head's rows from (half, pair) to (pair, half), Meta's order."""
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
    """Round to TF32's 10 explicit mantissa bits, to nearest, ties to even."""
    bits = x.float().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).to(x)


def bf16(x: Tensor) -> Tensor:
    """Round to bfloat16."""
    return x.bfloat16().to(x)


def products(rounding: Operation) -> dict[str, Operation]:
    """Return the matrix products by name, their inputs rounded by ``rounding``."""

    def rounded(product: Operation) -> Operation:
        return lambda a, b: product(rounding(a), rounding(b))

    originals = (linear, attention_scores, attention_mix)
    return {product.__name__: rounded(product) for product in originals}


def lower(dtype: torch.dtype) -> torch.dtype:
    """Return the next precision below: float32 for float64, else bfloat16."""
    return torch.float32 if dtype == torch.float64 else torch.bfloat16


def norm_low_precision(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(mean_square(x.to(lower(x.dtype))).to(x) + eps))


def rope_frequencies_bf16(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    kept = rope_frequencies(config).bfloat16()  # a buffer that model.bfloat16() cast
    return cos_sin(positions, kept.double(), dtype)


def rope_angles_float32(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    pairs = torch.arange(0, config.head_dim, 2).float()
    inv_freq = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    return cos_sin(positions, scaled(inv_freq, config), dtype)


def rope_frequencies_not_doubled(
    positions: Tensor, config: LlamaConfig, dtype: torch.dtype
) -> Tables:
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float64)
    return cos_sin(
        positions, scaled(config.rope_theta ** (-pairs / config.head_dim), config), dtype
    )


def rope_decode_tables(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    return (rope_theta_ignored if positions.shape[1] == 1 else rope_tables)(
        positions, config, dtype
    )


def rope_theta_ignored(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    return rope_tables(positions, dataclasses.replace(config, rope_theta=1e4), dtype)


def rope_scaling_ignored(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    return cos_sin(positions, config.rope_theta ** (-pairs / config.head_dim), dtype)


def rope_scaling_uniform(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    factor = 1.0 if config.rope_type == "default" else config.rope_factor
    return rope_scaling_ignored(positions / factor, config, dtype)


def rope_scaling_unsmoothed(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    if config.rope_type != "llama3":
        return rope_tables(positions, config, dtype)
    plain = rope_frequencies(dataclasses.replace(config, rope_type="default"))
    turns = plain * config.rope_original_max_seq_len / (2 * math.pi)
    slow = turns <= config.rope_low_freq_factor
    return cos_sin(positions, torch.where(slow, plain / config.rope_factor, plain), dtype)


def left_padding_in_positions(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Tables:
    columns = torch.arange(1 - positions.shape[1], 1) + positions.max()  # the same for every row
    return rope_tables(columns.expand_as(positions), config, dtype)


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
        "rope_tables_bf16": lambda positions, config, dtype: tuple(
            table.to(dtype) for table in rope_tables(positions, config, torch.bfloat16)
        ),
        "rope_frequencies_bf16": rope_frequencies_bf16,
        "rope_positions_bf16": lambda positions, *rest: rope_tables(positions.bfloat16(), *rest),
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
        "mask_next_seen": lambda t, s: torch.ones(t, s, dtype=torch.bool).tril(s - t + 1),
        "mask_itself_hidden": lambda t, s: torch.ones(t, s, dtype=torch.bool).tril(s - t - 1),
    },
}

# By each bug's name, the replaced operations by their names.
BUGS: dict[str, dict[str, Operation]] = {
    name: {operation: bug}
    for operation, bugs in _BY_OPERATION.items()
    for name, bug in bugs.items()
}

BUGS |= {"matmul_tf32": products(tf32), "matmul_bf16": products(bf16)}
