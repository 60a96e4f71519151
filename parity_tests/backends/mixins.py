"""Methods of the backend protocol, implemented by means of its other methods."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from reference_np.backend import Array


class LogitsByDecode:
    """Adds ``logits``: those of ``decode`` without a cache."""

    decode: Any  # (config, params, tokens, positions, mask, cache) -> logits, cache

    def logits(self, *arguments: Any) -> Array:
        """Return the logits [B, T, V] of ``arguments``: config, params, tokens, positions, mask."""
        logits: Array = self.decode(*arguments, None)[0]
        return logits


class TraceByTracedDecode:
    """Adds ``trace``: the activations of ``traced_decode`` without a cache."""

    traced_decode: Any  # (config, params, tokens, positions, mask, cache) -> activations, cache

    def trace(self, *arguments: Any) -> Mapping[str, Array]:
        """Return the activations of ``arguments`` by name (reference_np/naming.py has the axes)."""
        activations: Mapping[str, Array] = self.traced_decode(*arguments, None)[0]
        return activations


class LogitsByEngine:
    """Adds ``logits`` to an engine: each row is begun with one token and continued by single ones.

    For limits.masks "causal" and limits.positions "consecutive".
    """

    start: Any  # (config, params, rows) -> logits [B, V]
    append: Any  # tokens [B, T] -> logits [B, V]

    def logits(
        self, config: Any, params: Any, tokens: Array, positions: Array | None, mask: Array | None
    ) -> Array:
        """Return the logits [B, T, V] of tokens [B, T]."""
        if positions is not None or mask is not None:
            raise NotImplementedError("an engine takes neither positions nor a mask")
        first, *rest = np.split(tokens, tokens.shape[1], axis=1)
        logits = [self.start(config, params, list(first)), *map(self.append, rest)]
        return np.stack([np.asarray(part) for part in logits], axis=1)
