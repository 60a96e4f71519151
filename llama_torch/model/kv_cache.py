"""Key/value caches: ``Cache``, which is immutable and grows, and ``StaticCache``, written in place.

Axes: L layer, B batch, N key/value heads, S key position (cache column), T token of this call,
K head_dim.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_common.errors import InputError

from .config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's rotated keys, and values, each [B, N, S, K]; never written to."""

    keys: Tensor
    values: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, N, S + T, K]: the cached ones, then k and v [B, N, T, K]."""
        return torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)


class StaticLayerCache(NamedTuple):
    """One layer of a StaticCache [B, N, S, K], and the column of the next keys and values.

    Where ``start`` is a tensor (int64 [T], the columns of the tokens), ``extend`` returns every
    column, written or not: shapes do not depend on it, so a CUDA graph can capture the call, and
    the mask must hide the columns not yet written.
    """

    keys: Tensor
    values: Tensor
    start: int | Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, N, T, K] in place; return views of keys and values [B, N, S, K].

        S is the number of columns up to the last one written, or all where ``start`` is a tensor.
        """
        if isinstance(self.start, Tensor):
            self.keys.index_copy_(2, self.start, k)
            self.values.index_copy_(2, self.start, v)
            return self.keys, self.values
        end = self.start + k.shape[2]
        self.keys[:, :, self.start : end] = k
        self.values[:, :, self.start : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache(NamedTuple):
    """Rotated keys, and values, of every layer, each [B, N, S, K]; never written to."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Number of key positions S, padding included."""
        return self.keys[0].shape[2]

    def layer(self, i: int) -> LayerCache:
        """Return layer ``i``'s keys and values."""
        return LayerCache(self.keys[i], self.values[i])


class StaticCache:
    """Cache allocated once for ``rows`` rows and ``size`` columns: keys and values [L, B, N, S, K].

    A forward pass writes its keys and values in place and returns this object. Columns from
    ``length`` on are free; reducing ``length`` drops the newest columns. Raises InputError where
    there is no memory for it.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (config.n_layers, rows, config.n_kv_heads, size, config.head_dim)
        self.keys, self.values = (allocate(shape, dtype, device) for _ in range(2))
        self.length = 0

    @property
    def size(self) -> int:
        """Number of columns allocated."""
        return self.keys.shape[3]

    def layer(self, i: int) -> StaticLayerCache:
        """Return layer ``i``'s keys and values; the next ones are written at column ``length``."""
        return StaticLayerCache(self.keys[i], self.values[i], self.length)

    def clear(self) -> None:
        """Drop all columns, and set them to zero in place."""
        self.keys.zero_()
        self.values.zero_()
        self.length = 0

    def select_rows(self, rows: Tensor, drop: int) -> None:
        """Keep rows ``rows``, int64 [n], without their first ``drop`` columns, in new memory."""
        self.keys = self._selected(self.keys, rows, drop)  # before the values: frees memory
        self.values = self._selected(self.values, rows, drop)
        self.length -= drop

    def shift(self, columns: int) -> None:
        """Move all columns to the right, or by a negative number to the left, in place.

        To the left the first columns are dropped. To the right the first ones keep what they had.
        """
        start, to = max(0, -columns), max(0, columns)
        assert start <= self.length <= self.size - to
        for layer in (*self.keys, *self.values):  # one at a time: each is copied
            layer[:, :, to : self.length + columns] = layer[:, :, start : self.length].clone()
        self.length += columns

    def put_rows(self, rows: Tensor, other: "StaticCache", index: Tensor) -> None:
        """Write the columns of another cache's rows ``index`` into the rows ``rows``.

        Both are int64 [n]. The columns end where this cache's newest do.
        """
        first = self.length - other.length
        for own, new in ((self.keys, other.keys), (self.values, other.values)):
            own[:, rows, :, first : self.length] = new[:, index, :, : other.length]

    def _selected(self, old: Tensor, rows: Tensor, drop: int) -> Tensor:
        layers, _, groups, size, width = old.shape
        new = allocate((layers, len(rows), groups, size - drop, width), old.dtype, old.device)
        new[..., : self.length - drop, :] = old[:, rows, :, drop : self.length]
        return new


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return zeros of a shape. Attention multiplies masked values by zero, and 0 * NaN is NaN.

    On a CPU NumPy allocates them: its pages take no memory until they are written. Raises
    InputError where there is no memory for them.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    try:
        if n_bytes >= 1 << 62:  # no library counts further
            raise MemoryError
        if device is not None and device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(dtype).view(shape)
    except (MemoryError, torch.OutOfMemoryError):
        raise InputError(
            f"no memory for {n_bytes / 1e9:.1f} GB of keys; use a smaller --max-new-tokens, or "
            "fewer prompts at a time"
        ) from None
