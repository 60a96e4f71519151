"""Methods of the backend protocol, implemented by means of its other methods."""

from collections.abc import Mapping
from typing import Any

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
