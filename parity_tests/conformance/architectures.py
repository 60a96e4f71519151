"""Hypothesis strategies for the architecture of a model, within a backend's limits."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits

from .drawn import Draw, composite

seeds = st.integers(0, 2**32 - 1)

EPSILONS = (1e-5, 1e-6, 1e-3)


@composite
def scalings(draw: Draw, limits: Limits = UNLIMITED) -> dict[str, Any]:
    """Draw LlamaConfig's fields of rotary scaling; thresholds within a small head's frequencies."""
    kinds = ["default", "linear", "llama3", "llama3"]
    supported = [kind for kind in kinds if kind in limits.rope_types]
    kind = draw(st.sampled_from(supported), label="rope_type")
    if kind == "default":
        return {}
    factor = draw(st.sampled_from([2.0, 8.0, 32.0]), label="rope_factor")
    if kind == "linear":
        return {"rope_type": kind, "rope_factor": factor}
    low = draw(st.sampled_from([1.0, 0.3]), label="rope_low_freq_factor")
    return {
        "rope_type": kind,
        "rope_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": low * draw(st.sampled_from([4.0, 40.0]), label="high / low"),
        "rope_original_max_seq_len": draw(st.sampled_from([16, 300, 8192]), label="original"),
    }


def epsilons(limits: Limits) -> st.SearchStrategy[float]:
    """Return the strategy of norm_eps."""
    rounded = (float(np.float32(eps)) if limits.float32_epsilon else eps for eps in EPSILONS)
    return st.sampled_from(list(rounded))


def common_fields(draw: Draw, limits: Limits) -> dict[str, Any]:
    """Draw the fields of LlamaConfig that are of no size: epsilon, base, tied, scaling, context."""
    longest = {} if limits.context is None else {"max_seq_len": limits.context}
    return {
        "norm_eps": draw(epsilons(limits), label="norm_eps"),
        "tie_embeddings": draw(st.sampled_from(limits.tied), label="tie_embeddings"),
        **longest,
        **draw(scalings(limits)),
    }


@composite
def configs(draw: Draw, least_width: int = 1, limits: Limits = UNLIMITED) -> LlamaConfig:
    """Draw a small architecture: n_rep, n_kv_heads and dim independent, odd counts.

    dim is a multiple of n_heads in half of them, as transformers requires even with an explicit
    head_dim. ``least_width`` is the least dim and hidden_dim.
    """
    n_kv_heads = draw(st.integers(1, 4), label="n_kv_heads")
    n_heads = n_kv_heads * draw(st.integers(1, 4), label="n_rep")
    if limits.head_dim != "dim / n_heads":
        always = limits.head_dim != "any"
        aligned = always or draw(st.booleans(), label="dim a multiple of n_heads")
        step = n_heads if aligned else 1
        dim = step * draw(st.integers(-(-least_width // step), 40 // step), label="dim / step")
        half = draw(st.integers(1, 8), label="head_dim / 2")
        # Square projections, as most models have: a transposed one fits no other.
        if aligned and draw(st.booleans(), label="head_dim = dim / n_heads"):
            half = max(1, min(half, 32 // n_heads))
            dim = max(2 * half * n_heads, -(-least_width // (2 * n_heads)) * 2 * n_heads)
            half = dim // (2 * n_heads)
    else:
        least = -(-least_width // (2 * n_heads))
        widest = max(least, min(8, 32 // n_heads))  # dim is 64 at most, or 32 heads of two
        half = draw(st.integers(least, widest), label="head_dim / 2")
        dim = 2 * half * n_heads
    return LlamaConfig(
        dim=dim,
        n_layers=draw(st.integers(1, 3), label="n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=2 * half,
        hidden_dim=draw(st.integers(least_width, 48), label="hidden_dim"),
        vocab_size=draw(st.integers(2, 70), label="vocab_size"),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 37.5]), label="rope_theta"),
        **common_fields(draw, limits),
    )
