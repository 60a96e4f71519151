"""No call of torch's model changes a cache."""

import numpy as np
import pytest
from hypothesis import given

from ..backends.torch_model import torch_forward, torch_model
from ..support.oracle_inputs import split_runs

pytestmark = pytest.mark.numeric


@given(run=split_runs())
def test_the_same_call_gives_the_same_answer(run: tuple) -> None:
    config, params, tokens, _ = run
    model = torch_model(config, params)
    _, torch_cache, _ = torch_forward(model, tokens[:, :-1])
    first, longer_torch, _ = torch_forward(model, tokens[:, -1:], cache=torch_cache)
    torch_forward(model, tokens[:, :1], cache=longer_torch)
    second, _, _ = torch_forward(model, tokens[:, -1:], cache=torch_cache)
    assert np.array_equal(first, second)
