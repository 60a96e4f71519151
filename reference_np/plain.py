"""The plainest low-precision Llama: every operation in float32, its result rounded once.

It is the independent baseline of tier 3 in tolerances: what an honest implementation that keeps
its activations in bfloat16 or float16, and accumulates in float32, must lose.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import ops
from .ops import Array

# Operations whose results such a model stores. RoPE's tables stay in float32.
STORED = (
    "embed",
    "linear",
    "rms_norm",
    "apply_rope",
    "attention_scores",
    "masked_softmax",
    "attention_mix",
    "swiglu",
    "add",
)


def round_to(x: Array, dtype: str) -> Array:
    """Round a float32 array to ``bfloat16`` or ``float16`` values, ties to even."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    # bfloat16 is float32's upper half: add just under half of the lower, one more if odd.
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def plain_ops(dtype: str) -> SimpleNamespace:
    """Return ops for ``forward`` that store every result in ``dtype``; parameters float32."""

    def stored(operation: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *args: round_to(operation(*args), dtype)

    operations: dict[str, Any] = dict(vars(ops))
    operations |= {name: stored(operations[name]) for name in STORED}
    return SimpleNamespace(**operations)
