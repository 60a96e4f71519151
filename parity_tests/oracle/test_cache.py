"""No call changes a cache, and the same call gives the same result to the bit."""

import numpy as np
import pytest
from hypothesis import given

from reference_np.model import Cache, forward

from ..conformance.strategies import caches_equal
from ..support.oracle_inputs import split_runs

pytestmark = pytest.mark.numeric


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
