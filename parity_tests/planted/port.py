"""Backends with planted bugs: a compact Llama in torch, one operation of which is replaced.

It shares no code with llama_torch or with the oracle's mutants, so that compare.py's diagnosis,
which uses those, is tested on independent implementations. Each bug is written as a porter would
write it; all other operations are right.
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
    """The model as a backend, with one bug of BUGS by its name, or with none."""

    dtypes = ("float64", "float32")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.ops = SimpleNamespace(**{**OPERATIONS, **(BUGS[name] if name else {})})

    def logits(self, *arguments: Any) -> Array:
        return self.traced_decode(*arguments)[0]["logits"]

    def decode(self, *arguments: Any) -> tuple[Array, Cache]:
        activations, cache = self.traced_decode(*arguments)
        return activations["logits"], cache

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
        """Return every activation of a call that continues ``cache``, and the longer cache."""
        activations: dict[str, Array] = {}
        # Copies: torch warns of read-only arrays.
        inputs = (
            None if x is None else torch.from_numpy(np.array(x)) for x in (tokens, positions, mask)
        )

        def trace(name: str, value: Tensor) -> None:
            activations[name] = value.numpy()

        with torch.no_grad():
            _, cache = forward(config, params, *inputs, cache, trace, self.ops)
        return activations, cache


# Each model by its bug's name, for ``compare.py --against parity_tests.planted:bug.NAME``.
bug = SimpleNamespace(**{name: Planted(name) for name in BUGS})
