"""Keep a small model's parameters in memory, which a diagnosis by logits reads many times."""

import math

from reference_np.config import LlamaConfig
from reference_np.naming import parameter_shapes
from reference_np.ops import Array

from .replay import RoundedParams

MOST_KEPT = 1 << 30  # bytes


class KeptParams(RoundedParams):
    """Parameters that are read once each."""

    def __init__(self, params: RoundedParams) -> None:
        vars(self).update(vars(params))
        self._kept: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._kept:
            self._kept[name] = super().__getitem__(name)
        return self._kept[name]


def keep_if_small(params: RoundedParams, config: LlamaConfig) -> RoundedParams:
    """Return parameters that are read once each, where all take up to ``MOST_KEPT`` bytes."""
    width = 8 if params.dtype == "float64" else 4
    size = width * sum(map(math.prod, parameter_shapes(config).values()))
    return KeptParams(params) if size <= MOST_KEPT else params
