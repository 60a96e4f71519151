"""NumpyStep is held to the oracle, as every backend is: its logits and its cache."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llama_torch.inference import numpy_step
from llama_torch.inference.numpy_step import NumpyStep
from llama_torch.model.config import ModelConfig
from llama_torch.model.kv_cache import StaticCache
from llama_torch.model.llama import Llama
from reference_np.config import LlamaConfig

from ..backends.torch_model import torch_config, torch_model
from ..conformance.judge import Judge, Outputs
from ..conformance.oracle import Oracle
from ..conformance.strategies import Array, Params, cast, unmasked_cases_for

pytestmark = pytest.mark.numeric

SPARE_COLUMNS = 2  # columns of the cache after the last token


class NumpyStepBackend:
    """Backend that decodes a single token with NumpyStep, and several with the torch model."""

    def __init__(self, size: int) -> None:
        self.size = size

    @torch.inference_mode()
    def decode(
        self, config: LlamaConfig, params: Params, tokens: Array, *given: Any
    ) -> tuple[Array, StaticCache]:
        model, cache = torch_model(config, params), given[-1]
        if cache is None:
            cache = StaticCache(torch_config(config), 1, self.size, model.head_weight.dtype)
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)
        if tokens.shape[1] > 1:
            logits, cache = model(torch.from_numpy(tokens), cache=cache)
            return logits.numpy(), cache
        assert NumpyStep.supports(model)
        return NumpyStep(model, cache).decode(torch.from_numpy(tokens[0]))[None].numpy(), cache


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(data=st.data())
@settings(max_examples=40)
def test_steps_after_a_prefill_are_the_oracles(dtype: str, data: st.DataObject) -> None:
    case = data.draw(unmasked_cases_for(dtype), label="case")
    tokens = case.tokens[:1]
    length = tokens.shape[1]
    prefilled = data.draw(st.integers(0, length - 1), label="prefilled")
    low = cast(case.params, dtype)
    # Products split among threads too, whatever the number of rows.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_step, "MIN_SPLIT_BYTES", data.draw(st.sampled_from([0, 2**24])))
        patch.setattr(torch, "get_num_threads", lambda: 3)

        def run(backend: Any, params: Params = low) -> Outputs:
            cuts = [0, *range(prefilled or 1, length + 1)]
            cache, logits = None, []
            for start, end in itertools.pairwise(cuts):
                called = case.config, params, tokens[:, start:end], None, None, cache
                step, cache = backend.decode(*called)
                logits.append(step)
            outputs = {"logits": np.concatenate(logits, axis=1)}
            assert cache.length == length
            for i in range(case.config.n_layers):  # [1, N, S, K], to be judged token by token
                for name in ("keys", "values"):
                    cached = np.asarray(getattr(cache, name)[i])
                    assert np.isnan(cached[:, :, length:]).all(), "written past the last token"
                    outputs[f"layers.{i}.{name}"] = np.swapaxes(cached[:, :, :length], 1, 2)
            return outputs

        exact = run(Oracle(), {name: value.astype(np.float64) for name, value in low.items()})
        backend = NumpyStepBackend(length + SPARE_COLUMNS)
        Judge().compare(backend, dtype, run, exact, rms_only=dtype == "float32")


def test_a_step_returns_new_logits_and_writes_nothing_but_its_column() -> None:
    config = ModelConfig(dim=12, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=9)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cache = StaticCache(config, 1, 3)
    step = NumpyStep(model, cache)
    first = step.decode(torch.tensor([4]))
    kept, keys = first.clone(), cache.keys[..., :1, :].clone()
    second = step.decode(torch.tensor([5]))
    assert first.shape == (1, 9)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert torch.equal(cache.keys[..., :1, :], keys)
    cache.length = 1  # forget the newest
    assert torch.equal(step.decode(torch.tensor([5])), second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_models_that_a_step_supports() -> None:
    config = ModelConfig(dim=12, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=9)
    assert NumpyStep.supports(Llama(config))
    assert NumpyStep.supports(Llama(config).double())
    assert not NumpyStep.supports(Llama(config).bfloat16())
    assert not NumpyStep.supports(Llama(config).to("meta"))

    class Quantized(nn.Linear):
        pass

    other = Llama(config)
    other.model.layers[0].mlp.up_proj = Quantized(12, 8, bias=False)
    assert not NumpyStep.supports(other)
