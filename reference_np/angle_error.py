"""The error of rotary angles that are multiplied in float32, for backends that declare them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .config import LlamaConfig
from .ops import Array, rope_frequencies
from .tolerances import UNIT_ROUNDOFF

# Roundings of a frequency theta^(-2i/K), besides its exponent's: the power (a unit in the last
# place, two roundings), the reciprocal, and the division by K where theta's power is taken apart.
POWER_ROUNDINGS = 4.0
# ... and of its scaling: a division; for llama3 the mix of two terms.
SCALING_ROUNDINGS = {"default": 0.0, "linear": 1.0, "llama3": 3.0}
# Roundings of llama3's g besides the frequency's: three products, a difference, a quotient.
MIX_ROUNDINGS = 5.0
# Roundings of a cosine or sine: the function's unit in the last place.
TABLE_ROUNDINGS = 2.0


def float32_angle_bound(positions: Array, config: LlamaConfig) -> tuple[Array, Array]:
    """Bound the errors, in radians, of every angle m f_i that is a product in float32.

    positions [B, T] -> two arrays [B, T, K / 2]: what the frequency adds to the angle, with one
    sign for every position, and what the product and its cosine or sine add, with any sign.

    Positions are exact in float32 below 2^24. With u = 2^-24, each rounding multiplies by at most
    1 + u, so that the angle is off by at most m u times f_i for each. The exponent's rounding, of
    2i/K < 1, multiplies f_i = theta^(-2i/K) by theta^(2i/K u): ``ln(theta)`` roundings. Between
    llama3's thresholds f (g + (1 - g) / factor) follows the error of
    g = (L f / (2 pi) - low) / (high - low), which has that of f times at most high / (high - low).
    """
    unit = UNIT_ROUNDOFF["float32"]
    scaled, plain = rope_frequencies(config), rope_frequencies(replace(config, rope_type="default"))
    roundings = abs(math.log(config.rope_theta)) + POWER_ROUNDINGS
    of_frequency = (roundings + SCALING_ROUNDINGS[config.rope_type]) * scaled
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_max_seq_len * plain / (2 * math.pi)
        mixed = (turns > low * (1 - 1e-5)) & (turns < high * (1 + 1e-5))
        of_mix = (roundings + MIX_ROUNDINGS) * high / (high - low) * plain
        of_frequency = of_frequency + np.where(mixed, of_mix, 0.0)
    m = np.abs(positions[..., None]).astype(np.float64)
    return m * unit * of_frequency, m * unit * scaled + TABLE_ROUNDINGS * unit


# Signs of the errors of the angles: of every frequency alike, and drawn for each.
ANGLE_PATTERNS = 4


def inexact_tables(pattern: int) -> Callable[..., tuple[Array, Array]]:
    """Return rope_tables, every angle off by the bound of a float32 product.

    The rounded frequency turns all positions one way, the rounded product each its own way; the
    signs are functions of ``pattern``, frequency and position, so that a cache fits its tokens.
    """

    def rope_tables(positions: Array, config: LlamaConfig, dtype: Any) -> tuple[Array, Array]:
        exact = positions[..., None].astype(np.float64) * rope_frequencies(config)
        of_frequency, of_product = float32_angle_bound(positions, config)
        i = np.arange(exact.shape[-1])
        # The high bits of a product with an odd constant are as good as random (Knuth 6.4).
        mixed = (positions[..., None] * 2654435761 + (i + 1) * 40503 + pattern * 69069) >> 13
        by_frequency = np.where(pattern and ((i + 1) * (2 * pattern + 1) >> 1) & 1, -1.0, 1.0)
        by_product = np.where(mixed & 1, -1.0, 1.0)
        angles = exact + by_frequency * of_frequency + by_product * of_product
        return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)

    return rope_tables
