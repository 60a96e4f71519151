"""Porting bugs planted in torch: a compact Llama whose every operation can be replaced.

It shares nothing with llama_torch or with the oracle's own mutants, so that a diagnosis made
with those has something independent to name. Each bug is written as a porter would write it;
everything around it stays right.

Axes: B batch, T query position (this call's tokens), S key position (cache and this call),
D dim, H query heads, N key/value heads, K head_dim, F hidden_dim, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_np.config import LlamaConfig

from .bugs import BUGS
from .operations import OPERATIONS, Array, Cache, Params, forward


class Planted:
    """The model with one bug of BUGS, or with none, behind the protocol of backends."""

    dtypes = ("float64", "float32")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.ops = SimpleNamespace(**{**OPERATIONS, **(BUGS[name] if name else {})})

    def logits(self, *arguments: Any) -> Array:
        return self.traced_decode(*arguments)[0]["logits"]

    def decode(self, *arguments: Any) -> tuple[Array, Cache]:
        found, cache = self.traced_decode(*arguments)
        return found["logits"], cache

    def trace(self, *arguments: Any) -> dict[str, Array]:
        return self.traced_decode(*arguments)[0]

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None = None,
    ) -> tuple[dict[str, Array], Cache]:
        """Every activation of a call that continues ``cache``, and the longer cache."""
        found: dict[str, Array] = {}
        at, see = (None if x is None else torch.from_numpy(np.array(x)) for x in (positions, mask))
        ids = torch.from_numpy(np.array(tokens))

        def note(name: str, value: Tensor) -> None:
            found[name] = value.numpy()

        with torch.no_grad():
            cache = forward(config, params, ids, at, see, cache, note, self.ops)[1]
        return found, cache


# Each planted port by its bug's name, for ``compare.py --against parity_tests.planted:bug.NAME``.
bug = SimpleNamespace(**{name: Planted(name) for name in BUGS})
