"""The CPU's decoding steps are held to the oracle, as every backend is: logits and cache."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llama_torch.inference import native_library, numpy_step
from llama_torch.inference.native_step import MAX_ROWS, NativeStep
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


NATIVE = pytest.param(
    NativeStep,
    marks=pytest.mark.skipif(
        native_library.load(torch.float32) is None, reason="no C compiler with OpenMP here"
    ),
)
STEPS = (NumpyStep, NATIVE)
Kind = type[NumpyStep | NativeStep]


class StepBackend:
    """Backend that decodes a single token with a step, and several with the torch model."""

    def __init__(self, kind: Kind, size: int) -> None:
        self.kind, self.size = kind, size

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
        return self.kind(model, cache).decode(torch.from_numpy(tokens[0]))[None].numpy(), cache


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(data=st.data())
@settings(max_examples=40)
def test_steps_after_a_prefill_are_the_oracles(kind: Kind, dtype: str, data: st.DataObject) -> None:
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
        backend = StepBackend(kind, length + SPARE_COLUMNS)
        Judge().compare(backend, dtype, run, exact, rms_only=dtype == "float32")


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_returns_new_logits_and_writes_nothing_but_its_column(kind: Kind) -> None:
    config = ModelConfig(dim=12, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=9)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cache = StaticCache(config, 1, 3)
    step = kind(model, cache)
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


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("token", [9, -10, 1 << 40, -1])
def test_a_token_outside_the_vocabulary_is_refused(kind: Kind, token: int) -> None:
    """Nothing is read outside the embedding, and nothing written."""
    config = ModelConfig(dim=12, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=9)
    cache = StaticCache(config, 1, 3)
    step = kind(Llama(config), cache)
    with pytest.raises(IndexError):
        step.decode(torch.tensor([token]))
    assert cache.length == 0
    assert not cache.keys.any()


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


@pytest.mark.skipif(native_library.load(torch.float32) is None, reason="no C compiler here")
def test_the_models_that_the_compiled_step_supports() -> None:
    config = ModelConfig(dim=12, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=9)
    model = Llama(config)
    assert NativeStep.supports(model, MAX_ROWS)
    assert not NativeStep.supports(model, MAX_ROWS + 1)
    assert NativeStep.supports(Llama(config).double(), 1)
    assert NativeStep.supports(Llama(config).bfloat16(), 1)
    assert not NativeStep.supports(Llama(config).half(), 1)
    assert not NativeStep.supports(Llama(config).to("meta"), 1)
    model.model.norm = model.model.norm.bfloat16()
    assert not NativeStep.supports(model, 1)

    class Sharded(nn.Parameter):
        pass

    other = Llama(config)
    other.model.norm.weight = Sharded(torch.ones(12))
    assert not NativeStep.supports(other, 1)


@pytest.mark.skipif(native_library.load(torch.float32) is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each row gets what it gets alone, whatever its padding and the others."""
    config = ModelConfig(dim=72, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=50, vocab_size=99)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(dtype)
    padding, tokens = [0, 2, 1, 3, 0, 0, 5, 1, 1, 0, 4], torch.arange(11)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        cache = StaticCache(config, 11, 9, dtype)
        step = NativeStep(model, cache)
        step.begin(padding)
        found.append(torch.stack([step.decode(tokens + 11 * i) for i in range(8)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for row, pads in enumerate(padding):
        alone = NativeStep(model, StaticCache(config, 1, 9, dtype))
        for i in range(pads, 8):
            mine = alone.decode(tokens[row : row + 1] + 11 * i)[0]
            error = (mine - found[0][i, row]).abs().max() / mine.abs().max()
            assert error < (1e-12 if dtype == torch.float64 else 1e-2), (row, i)


@pytest.mark.skipif(native_library.load(torch.float32) is None, reason="no C compiler here")
def test_a_bfloat16_cache_holds_the_nearest_numbers() -> None:
    """Of the first layer, whose values no rounding before them has changed."""
    config = ModelConfig(dim=72, n_layers=1, n_heads=6, n_kv_heads=6, hidden_dim=50, vocab_size=99)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.bfloat16, torch.float32):  # the same weights, rounded first
        cache = StaticCache(config, 1, 2, dtype)
        NativeStep(model.to(dtype), cache).decode(torch.tensor([7]))
        found.append(torch.stack([cache.keys[..., 0, :], cache.values[..., 0, :]]).double())
    narrow, wide = found
    assert ((narrow - wide).abs() <= wide.abs() * 2**-7.99 + 1e-12).all()
    assert not torch.equal(narrow, wide)
