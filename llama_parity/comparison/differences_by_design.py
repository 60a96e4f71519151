"""Differences by design that a port may declare, as variants of the oracle to be tried as bugs are.

They are no bugs, and so not in the catalogue of reference_np/mutants.py.
"""

import numpy as np

from reference_np import ops
from reference_np.config import LlamaConfig
from reference_np.mutants import Mutant
from reference_np.ops import Array


def _norm_float32_epsilon(x: Array, weight: Array, eps: float) -> Array:
    return ops.rms_norm(x, weight, float(np.float32(eps)))


EPSILON = Mutant(
    "epsilon_in_float32",
    "norm_eps is rounded to float32",
    "ONNX and GGUF files store it so; if this is by design, declare "
    "limits = reference_np.limits.Limits(float32_epsilon=True)",
    "rms_norm",
    _norm_float32_epsilon,
)


def by_design(config: LlamaConfig, precision: str) -> list[Mutant]:
    """Return the differences that can show in a config and a precision."""
    shows = precision == "float64" and float(np.float32(config.norm_eps)) != config.norm_eps
    return [EPSILON] if shows else []
