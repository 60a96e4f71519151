"""Refuse calls that no memory holds, before their arrays are made."""

import math

from llama_common.memory import gib, host_memory
from reference_np.config import InputError, LlamaConfig

CALL_BYTES = 300  # of a decoding step's Python objects, at least


def require_attention_memory(
    place: str, shape: tuple[int, ...], keys: int, config: LlamaConfig
) -> None:
    """Raise InputError where a call's attention scores, float64 [B, H, T, S], surely do not fit.

    The oracle has a layer's scores in memory, whole. ``place`` names the call's origin, ``shape``
    is that of its tokens [B, T], and ``keys`` the number of tokens S that they may attend to.
    """
    needed = 8 * math.prod(shape) * config.n_heads * keys
    _require(f"{place}: the oracle's scores of attention over {keys:,} tokens", needed)


def require_steps_memory(steps: int, runs: int) -> None:
    """Raise InputError where a run's decoding steps surely do not fit, as objects alone."""
    _require(f"--steps {steps}: the calls", CALL_BYTES * steps * runs)


def _require(what: str, needed: int) -> None:
    there = host_memory()
    if needed > there:
        raise InputError(
            f"{what} take at least {gib(needed)} of memory, and this machine has {gib(there)}; "
            "give fewer"
        )
