"""No call changes a cache, and the same call gives the same result to the bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from reference_np.model import Cache, forward

from ..conformance.architectures import configs
from ..conformance.drawn import Draw, composite, labelled
from ..conformance.strategies import caches_equal, chunk_sizes, params_for, tokens_for

pytestmark = pytest.mark.numeric


@composite
def split_runs(draw: Draw) -> Any:
    config = draw(configs())
    tokens = draw(tokens_for(config, min_length=2))
    values = config, draw(params_for(config)), tokens, draw(chunk_sizes(tokens.shape[1]))
    return labelled(values, draw.numbers)


@given(run=split_runs())
def test_the_same_call_gives_the_same_answer(run: tuple) -> None:
    config, params, tokens, _ = run
    _, cache = forward(params, tokens[:, :-1], config)
    before = Cache(tuple(k.copy() for k in cache.keys), tuple(v.copy() for v in cache.values))
    first, longer = forward(params, tokens[:, -1:], config, cache=cache)
    forward(params, tokens[:, :1], config, cache=longer)
    second, _ = forward(params, tokens[:, -1:], config, cache=cache)
    assert np.array_equal(first, second)
    assert caches_equal(cache, before)
