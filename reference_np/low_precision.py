"""A Llama in low precision: every operation computed in float32, its result rounded once.

It is the independent baseline of tier 3 in tolerances: its error is that of a correct
implementation which stores its activations in bfloat16 or float16 and accumulates in float32; or,
for "tf32", which stores them in float32 and rounds the inputs of its matrix products.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import grad, ops
from .model import Ops
from .ops import Array

# Operations whose results are stored in low precision. RoPE's tables stay in float32.
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
    """Round a float32 array to bfloat16, float16 or tf32 values, ties to even; float32 again."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    # The other two are float32 without its lowest bits. Adding just under half of the dropped
    # range, and one more where the lowest kept bit is odd, makes truncation round half to even.
    dropped = 13 if dtype == "tf32" else 16
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    rounded = (bits + half + ((bits >> dropped) & 1)) >> dropped << dropped
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def rounded_ops(dtype: str, operations: Ops = ops) -> SimpleNamespace:
    """Return the operations of ``forward``, float32 in and out, rounded to ``dtype``."""
    return _replaced(dict(vars(operations)), dtype, STORED, PRODUCTS)


def rounded_vjps(dtype: str) -> SimpleNamespace:
    """Return the operations of ``backward``, float32 in and out, rounded to ``dtype``."""
    operations = dict(vars(grad.REFERENCE_VJPS))
    return _replaced(operations, dtype, operations, [f"{name}_vjp" for name in PRODUCTS])


def with_rounded_moments(adamw: Callable[..., Any], dtype: str = "bfloat16") -> Callable[..., Any]:
    """Return AdamW's rule (optim.adamw) with its moments rounded to ``dtype`` once they are used.

    The parameter is updated by the moments that were computed; what the next step starts from is
    rounded, ties to even.
    """

    def rounded(*args: Any) -> Any:
        p, *moments = adamw(*args)
        return p, *(round_to(m.astype(np.float32), dtype).astype(m.dtype) for m in moments)

    return rounded


def _replaced(
    operations: dict[str, Any], dtype: str, stored: Iterable[str], products: Iterable[str]
) -> SimpleNamespace:
    """Return the operations, rounding the inputs of ``products`` for tf32, else every result."""

    def rounded(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(rounded, x))
        is_float32 = isinstance(x, np.ndarray) and x.dtype == np.float32
        return round_to(x, dtype) if is_float32 else x

    def round_result(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: rounded(operation(*args))

    def round_inputs(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: operation(*map(rounded, args))

    names, rounding = (products, round_inputs) if dtype == "tf32" else (stored, round_result)
    return SimpleNamespace(**operations | {name: rounding(operations[name]) for name in names})
