"""Generation on a GPU; the model itself is test_conformance's. Skipped where there is none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llama_torch.generate import generate

from .strategies import Case, cast, wide_cases
from .support import torch_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@given(case=wide_cases())
@settings(max_examples=5)
def test_greedy_decoding_equals_the_cpus(case: Case) -> None:
    model = torch_model(case.config, cast(case.params, np.float64))
    prompt = case.tokens[0].tolist()
    on_cpu = list(generate(model, prompt, 8))
    assert list(generate(model.cuda(), prompt, 8)) == on_cpu
