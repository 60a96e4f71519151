"""Keys and values of the tokens so far: a value that grows, or room that is written in place."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError
from .config import ModelConfig


class Past(NamedTuple):
    """One layer's rotated keys and values [B, N, S, K]. Never written to."""

    keys: Tensor
    values: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values, these [B, N, T, K] the last."""
        return torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)


class Room(NamedTuple):
    """One layer's share of a StaticCache, and the column where new keys and values go.

    Where ``start`` is a tensor (int64 [T], a column for each token), the whole room is returned,
    so that no shape depends on it and the call can be captured in a CUDA graph: the mask must
    hide the columns not written yet.
    """

    keys: Tensor
    values: Tensor
    start: int | Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, N, T, K] and return all keys and values."""
        if isinstance(self.start, Tensor):
            self.keys.index_copy_(2, self.start, k)
            self.values.index_copy_(2, self.start, v)
            return self.keys, self.values
        end = self.start + k.shape[2]
        self.keys[:, :, self.start : end] = k
        self.values[:, :, self.start : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache(NamedTuple):
    """Rotated keys and values of every layer so far, each [B, N, S, K]. Never written to."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Key positions held, padding included."""
        return self.keys[0].shape[2]

    def layer(self, i: int) -> Past:
        """Return layer ``i``'s part."""
        return Past(self.keys[i], self.values[i])


class StaticCache:
    """Room for ``size`` columns of every layer, allocated once: keys and values [L, B, N, S, K].

    A forward pass writes its keys and values here and returns the cache itself. Columns from
    ``length`` on are free; making ``length`` smaller forgets the newest.
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
        self.keys, self.values = (_room(shape, dtype, device) for _ in range(2))
        self.length = 0

    @property
    def size(self) -> int:
        """Columns that there is room for."""
        return self.keys.shape[3]

    def layer(self, i: int) -> Room:
        """Return layer ``i``'s part."""
        return Room(self.keys[i], self.values[i], self.length)

    def clear(self) -> None:
        """Forget all columns. Zeros again, as when it was made: see ``_room``."""
        self.keys.zero_()
        self.values.zero_()
        self.length = 0

    def keep(self, rows: Tensor, drop: int) -> None:
        """Keep some rows, without their first ``drop`` columns."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            layers, _, groups, size, width = old.shape
            kept = _room((layers, len(rows), groups, size - drop, width), old.dtype, old.device)
            kept[..., : self.length - drop, :] = old[:, rows, :, drop : self.length]
            setattr(self, name, kept)
        self.length -= drop


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return zeros: attention multiplies what a mask hides by zero, and zero times NaN is NaN.

    On the CPU NumPy's, whose pages take no memory until they are written. Raises InputError
    where there is no memory for them.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device is not None and device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(dtype).view(shape)
    except (MemoryError, torch.OutOfMemoryError):
        raise InputError(
            f"no memory for {n_bytes / 1e9:.1f} GB of keys; use a smaller --max-new-tokens, or "
            "fewer prompts at a time"
        ) from None
