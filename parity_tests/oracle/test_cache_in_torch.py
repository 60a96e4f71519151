"""No call of torch's model changes a cache."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from ..backends.torch_model import torch_forward, torch_model
from ..conformance.architectures import configs
from ..conformance.drawn import Draw, composite, labelled
from ..conformance.strategies import chunk_sizes, params_for, tokens_for

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
    model = torch_model(config, params)
    _, torch_cache, _ = torch_forward(model, tokens[:, :-1])
    first, longer_torch, _ = torch_forward(model, tokens[:, -1:], cache=torch_cache)
    torch_forward(model, tokens[:, :1], cache=longer_torch)
    second, _, _ = torch_forward(model, tokens[:, -1:], cache=torch_cache)
    assert np.array_equal(first, second)
