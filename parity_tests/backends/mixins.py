"""What a backend need not write where another of its methods computes it too."""

from collections.abc import Mapping
from typing import Any

from reference_np.backend import Array


class LogitsByDecode:
    """The logits of one pass, [B, T, V], as those of ``decode`` without a cache."""

    decode: Any

    def logits(self, *arguments: Any) -> Array:
        logits: Array = self.decode(*arguments, None)[0]
        return logits


class TraceByTracedDecode:
    """The activations of one pass, by name, as those of ``traced_decode`` without a cache."""

    traced_decode: Any

    def trace(self, *arguments: Any) -> Mapping[str, Array]:
        activations: Mapping[str, Array] = self.traced_decode(*arguments, None)[0]
        return activations
