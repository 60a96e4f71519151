"""The plainest low-precision Llama: every operation in float32, its result rounded once.

It is the independent baseline of tier 3 in tolerances: what an honest implementation that keeps
its activations in bfloat16 or float16, and accumulates in float32, must lose; or one that keeps
them in float32 and multiplies matrices in TF32, which rounds what goes into a product.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import grad, ops
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
PRODUCTS = ("linear", "attention_scores", "attention_mix")


def round_to(x: Array, dtype: str) -> Array:
    """Round a float32 array to ``bfloat16``, ``float16`` or ``tf32`` values, ties to even."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    # These are float32 without its lowest bits: add just under half of them, one more if odd.
    dropped = 13 if dtype == "tf32" else 16
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    rounded = (bits + half + ((bits >> dropped) & 1)) >> dropped << dropped
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def plain_ops(dtype: str) -> SimpleNamespace:
    """Return ops for ``forward`` that compute as ``dtype`` does; parameters float32."""
    return _replaced(dict(vars(ops)), dtype, STORED, PRODUCTS)


def plain_vjps(dtype: str) -> SimpleNamespace:
    """Return vjps for ``backward`` that compute as ``dtype`` does; parameters float32."""
    operations = dict(vars(grad.REFERENCE))
    return _replaced(operations, dtype, operations, [f"{name}_vjp" for name in PRODUCTS])


def _replaced(
    operations: dict[str, Any], dtype: str, stored: Iterable[str], products: Iterable[str]
) -> SimpleNamespace:
    """Round what products read, for tf32, or else what operations store."""

    def low(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(low, x))
        is_value = isinstance(x, np.ndarray) and x.dtype == np.float32
        return round_to(x, dtype) if is_value else x

    def storing(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: low(operation(*args))

    def reading(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: operation(*map(low, args))

    names, rounding = (products, reading) if dtype == "tf32" else (stored, storing)
    return SimpleNamespace(**operations | {name: rounding(operations[name]) for name in names})
