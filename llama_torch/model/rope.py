"""Rotary position embeddings (RoPE, Su et al. 2021), in the rotate-half form of Hugging Face.

Suffixes: B batch, T position, H query or key heads, K head_dim.
"""

import math

import torch
from torch import Tensor

from .config import ModelConfig

RopeTables = tuple[Tensor, Tensor]  # cos and sin, each [B, T, 1, K / 2]


def rope_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Return the rotary frequencies ``theta^(-2i / K)`` [K / 2], scaled, in float64.

    rope_type "linear" divides all by ``rope_factor`` (Chen et al. 2023). "llama3" (Grattafiori et
    al. 2024, as released with Llama 3.1) divides those that turn less than ``rope_low_freq_factor``
    times in the original context, and interpolates up to ``rope_high_freq_factor`` turns.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequencies: Tensor = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_type == "default":
        return frequencies
    unscaled = torch.zeros_like(frequencies)
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = frequencies * (config.rope_original_max_seq_len / (2 * math.pi))
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(frequencies / config.rope_factor, frequencies, unscaled)


def rope_tables(positions_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> RopeTables:
    """Return cos and sin of the rotation angles, each [B, T, 1, K / 2] (Su et al. 2021, eq. 15).

    An angle is position times frequency, in float64. The tables are rounded once: to float32, or
    not at all if ``dtype`` is float64 (bfloat16 cannot represent position 257).
    """
    frequencies = rope_frequencies(config, positions_BT.device)
    angles = positions_BT[..., None, None].double() * frequencies
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def apply_rope(x_BTHK: Tensor, tables: RopeTables) -> Tensor:
    """Return ``x`` [B, T, H, K] with each pair (a, b) = (x_i, x_{i + K/2}) rotated.

    To (a cos - b sin, b cos + a sin), in the tables' precision, rounded to the dtype of ``x``.
    """
    cos, sin = tables
    first, second = x_BTHK.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x_BTHK.dtype)
