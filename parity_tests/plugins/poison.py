"""Fill uninitialised memory with NaN, and check the gaps between the rows of products' operands.

Installed by ``pytest parity_tests/ --poison``. A result that depends on memory which was never
written becomes NaN or raises, instead of being right by chance.

Some kernels read more than their operand: oneDNN's bfloat16 product on a CPU with AMX reads the
memory between the rows of a strided view, and multiplies it by zero. On other processors no test
would show that, so the gaps of every operand are checked before the product.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .environment import POISONED

# Substrings of the names of operations that multiply matrices.
PRODUCTS = ("mm", "mv", "dot", "attention", "linear", "conv")


def fill_array(array: Any) -> Any:
    """Fill a NumPy array with NaN, or with its type's largest integer, and return it."""
    if array.dtype.kind in "fc":
        array.fill(np.nan)
    elif array.dtype.kind in "iu":
        array.fill(np.iinfo(array.dtype).max)
    elif array.dtype.kind == "b":
        array.fill(True)
    return array


def install(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Fill every further allocation of this process and of its subprocesses.

    Torch fills its allocations, in C++ too (``resize_``, ``Tensor.new``, an operation's result),
    where deterministic algorithms are asked for. The memory of other libraries is filled by
    ``MALLOC_PERTURB_``, if it is set before the process starts.
    """
    if hasattr(np.empty, "__wrapped__"):
        return
    os.environ[POISONED] = "1"
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name in ("empty", "empty_like"):
        patch(np, name, _filling(getattr(np, name)))


def _filling(real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def filled(*args: Any, **kwargs: Any) -> Any:
        return fill_array(real(*args, **kwargs))

    return filled


def install_if_asked() -> None:
    """Call ``install`` where the parent process had called it."""
    if os.environ.get(POISONED):
        install()


def gaps_are_finite(operand: Tensor) -> bool:
    """Return whether the memory between an operand's rows is finite.

    True for an operand without gaps, and for one that contains NaN or infinity itself.
    """
    if operand.layout != torch.strided or operand.numel() == 0 or not operand.is_floating_point():
        return True
    by_stride = sorted(
        (s, n) for s, n in zip(operand.stride(), operand.shape, strict=True) if n > 1
    )
    row = by_stride.pop(0)[1] if by_stride and by_stride[0][0] == 1 else 1
    if not by_stride or by_stride[0][0] <= row or not operand.isfinite().all():
        return True
    pitch, n_rows = by_stride[0]
    start = operand.storage_offset() + row
    end = start + sum(s * (n - 1) for s, n in by_stride) + pitch - row
    if end > operand.untyped_storage().nbytes() // operand.itemsize:  # none after the last row
        by_stride[0] = pitch, n_rows - 1
    strides, sizes = zip(*by_stride, strict=True)
    gaps = operand.as_strided((*sizes, pitch - row), (*strides, 1), start)
    return bool(gaps.isfinite().all())


class WatchedProducts(TorchDispatchMode):
    """Raises AssertionError where a matrix product could read NaN between an operand's rows."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Check the gaps of the operands, then compute."""
        if any(part in func.__name__ for part in PRODUCTS):
            for operand in args:
                if type(operand) is Tensor:
                    where = f"{func}: {tuple(operand.shape)} with strides {operand.stride()}"
                    assert gaps_are_finite(operand), f"never written between the rows of {where}"
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(item: pytest.Item) -> Iterator[None]:
    """Check the products of a test, unless it compiles or captures a CUDA graph, which cannot."""
    unwatched = "compile" in item.name or "cuda" in item.nodeid
    if unwatched or not os.environ.get(POISONED):
        yield
        return
    with WatchedProducts():
        yield
