"""Float32 angles err within their derived bound, and not by far less."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np.angle_error import float32_angle_bound
from reference_np.config import LlamaConfig
from reference_np.ops import rope_frequencies

from ..conformance.architectures import scalings

F = np.float32


def frequencies_float32(config: LlamaConfig) -> np.ndarray:
    """Return the frequencies [K / 2], every operation in float32, as transformers and MLX do."""
    exponent = np.arange(0, config.head_dim, 2, dtype=F) / F(config.head_dim)
    plain = F(1) / F(config.rope_theta) ** exponent
    if config.rope_type == "default":
        return plain
    slow = plain / F(config.rope_factor)
    if config.rope_type == "linear":
        return slow
    low, high = F(config.rope_low_freq_factor), F(config.rope_high_freq_factor)
    length = F(config.rope_original_max_seq_len)
    wave = F(2 * np.pi) / plain
    g = (length / wave - low) / (high - low)
    mixed = (F(1) - g) * slow + g * plain
    return np.where(wave > length / low, slow, np.where(wave < length / high, plain, mixed))


@given(
    scaling=scalings(),
    theta=st.sampled_from([37.5, 1e4, 5e5, 8e6]),
    half=st.sampled_from([1, 3, 8, 32, 64]),
    seed=st.integers(0, 999),
)
def test_float32_angles_err_within_their_bound(
    scaling: dict, theta: float, half: int, seed: int
) -> None:
    config = LlamaConfig(8, 1, 1, 1, 2 * half, 8, 8, rope_theta=theta, **scaling)
    positions = np.random.default_rng(seed).integers(0, 70_000, (1, 50))
    exact = positions[..., None] * rope_frequencies(config)
    angles = positions[..., None].astype(F) * frequencies_float32(config)
    assert angles.dtype == F
    of_frequency, of_product = float32_angle_bound(positions, config)
    assert (np.abs(angles - exact) <= of_frequency + of_product).all()
    cosines = np.cos(angles).astype(np.float64)
    assert (np.abs(cosines - np.cos(exact)) <= of_frequency + of_product).all()


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_the_bound_is_at_most_a_hundred_times_the_error(theta: float) -> None:
    config = LlamaConfig(8, 1, 1, 1, 64, 8, 8, rope_theta=theta)
    positions = np.arange(0, 70_000, 7)[None]
    exact = positions[..., None] * rope_frequencies(config)
    angles = positions[..., None].astype(F) * frequencies_float32(config)
    worst = np.abs(angles - exact).max(axis=(0, 1))
    bound = sum(float32_angle_bound(positions, config)).max(axis=(0, 1))
    assert (bound < 100 * worst)[1:].all()  # the first frequency is 1: its product is exact


def test_the_bound_is_far_below_bfloat16s_error() -> None:
    config = LlamaConfig(8, 1, 1, 1, 64, 8, 8)
    of_frequency, of_product = float32_angle_bound(np.array([[4096]]), config)
    bfloat16 = 4096 * rope_frequencies(config) * 2.0**-9
    assert (of_frequency + of_product < bfloat16 / 100).all()
