"""Inputs and runs of the oracle that its tests share with those that compare it with torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from reference_np.config import LlamaConfig
from reference_np.model import forward

from ..conformance.architectures import configs
from ..conformance.drawn import Draw, composite, labelled
from ..conformance.strategies import Array, Case, cast, chunk_sizes, params_for, tokens_for


def oracle_trace(case: Case, dtype: type) -> dict[str, Array]:
    """Return every activation of a case by name, computed in a dtype."""
    trace: dict[str, Array] = {}
    forward(
        cast(case.params, dtype),
        case.tokens,
        case.config,
        positions=case.positions,
        mask=case.mask,
        trace=trace.__setitem__,
    )
    return trace


def transposed(
    params: Mapping[str, Array], part: str, *, square_only: bool = False
) -> dict[str, Array]:
    """Return parameters, transposed where their names hold ``part`` and they are matrices.

    ``square_only``: where the transposed matrix has the shape of the right one.
    """

    def is_meant(name: str, value: Array) -> bool:
        fits = not square_only or value.shape == value.T.shape
        return value.ndim == 2 and part in name and fits

    return {n: value.T if is_meant(n, value) else value for n, value in params.items()}


@composite
def split_runs(draw: Draw) -> Any:
    """Draw a config, its parameters, tokens [B, T] and the sizes of chunks of them."""
    config = draw(configs())
    tokens = draw(tokens_for(config, min_length=2))
    values = config, draw(params_for(config)), tokens, draw(chunk_sizes(tokens.shape[1]))
    return labelled(values, draw.numbers)


def draw_array(seed: int, *shape: int, scale: float = 1.0) -> Array:
    """Return normal numbers of a shape times ``scale``."""
    return scale * np.random.default_rng(seed).standard_normal(shape)


def heads_of(width: int, **change: Any) -> LlamaConfig:
    """Return a config with this head_dim; the rotary tables depend on no other size."""
    return LlamaConfig(8, 1, 1, 1, width, 8, 8, **change)
