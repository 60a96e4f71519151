"""The key/value cache: a value that goes into the model and comes out longer."""

from typing import NamedTuple

from torch import Tensor


class Cache(NamedTuple):
    """Rotated keys and values of every layer so far, each [B, N, S, K]. Never written to."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Key positions held, padding included."""
        return self.keys[0].shape[2]
