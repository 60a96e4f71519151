"""Several prompts at once: every row has the tokens that it has alone, and as many."""

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch.inference import decoding, numpy_step
from llama_torch.inference.config import SamplingConfig
from llama_torch.inference.eager_step import EagerStep
from llama_torch.inference.engine import DecodeBatch, generate, generate_tokens
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from reference_np import sampling
from reference_np.config import LlamaConfig
from reference_np.model import forward

from ..backends.torch_model import torch_model
from ..conformance.architectures import configs, seeds
from ..conformance.drawn import Draw, composite, labelled
from ..conformance.strategies import Array, cast, random_params

pytestmark = pytest.mark.numeric

GREEDY = SamplingConfig(max_new_tokens=6, temperature=0)


def batch_tokens(
    model: Llama, prompts: list[list[int]], each: list[SamplingConfig], chunk: int = 512
) -> list[list[int]]:
    """Return each row's new tokens; rows end after their own ``max_new_tokens``."""
    found = [[] for _ in prompts]
    for token in generate_tokens(DecodeBatch(model, prompts, each, chunk)):
        found[token.prompt].append(token.id)
    return found


@composite
def batches(draw: Draw) -> Any:
    config = dataclasses.replace(draw(configs()), max_seq_len=draw(st.integers(8, 24)))
    ids = st.integers(0, config.vocab_size - 1)
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=7), min_size=2, max_size=4))
    lengths = [draw(st.integers(1, 6), label="new tokens") for _ in prompts]
    params = random_params(config, draw(seeds, label="weights seed"))
    return labelled((config, params, prompts, lengths), draw.numbers)


def near_tie(config: LlamaConfig, params: dict[str, Array], text: list[int], other: int) -> bool:
    """Return whether two tokens' logits differ by no more than rounding, by the float64 oracle."""
    logits = forward(params, np.array([text[:-1]]), config)[0][0, -1]
    return abs(logits[text[-1]] - logits[other]) <= 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(case=batches(), chunk=st.integers(1, 9))
def test_every_row_equals_its_own_single_run(dtype: str, case: Any, chunk: int) -> None:
    """Unequal prompts, unequal ends, any chunks of prefill; tokens are equal, not close.

    In float32 two logits may lie closer than a rounding, and then a batch, whose matrix
    products have other shapes, may choose the other; the oracle decides whether they do.
    """
    config, params, prompts, lengths = case
    stored = cast(params, np.dtype(dtype))
    model = torch_model(config, stored)
    each = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in lengths]
    found = batch_tokens(model, prompts, each, chunk)
    for prompt, settings, row in zip(prompts, each, found, strict=True):
        alone = list(generate(model, prompt, settings))
        if row != alone and dtype == "float32":
            n = next(i for i, pair in enumerate(zip(row, alone, strict=True)) if len({*pair}) == 2)
            exact = cast(stored, np.float64)
            assert near_tie(config, exact, prompt + row[: n + 1], alone[n])
            event("a tie in float32")
        else:
            assert row == alone


@given(case=batches())
def test_greedy_with_the_cache_is_the_oracles_choice(case: Any) -> None:
    config, params, prompts, _ = case
    model = torch_model(config, params)
    for prompt in prompts[:2]:
        text = list(prompt)
        for token in generate(model, prompt, GREEDY):
            last = forward(params, np.array([text]), config)[0][0, -1]
            # In float64 a tie is the only excuse for another choice.
            assert last[token] == pytest.approx(last.max(), rel=1e-10, abs=1e-12)
            text.append(token)
        assert len(text) == min(len(prompt) + 6, config.max_seq_len)


@given(case=batches(), seed=st.integers(0, 2**62), data=st.data())
def test_each_row_draws_from_its_own_settings_and_seed(
    case: Any, seed: int, data: st.DataObject
) -> None:
    """Sampled, with penalties: equal to the row alone, whose choices the oracle's numbers make."""
    config, params, prompts, lengths = case
    model = torch_model(config, params)
    kinds = st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.integers(0, 9),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
    )
    each = [
        dataclasses.replace(data.draw(kinds), max_new_tokens=n, seed=seed + i)
        for i, n in enumerate(lengths)
    ]
    found = batch_tokens(model, prompts, each)
    for prompt, settings, row in zip(prompts, each, found, strict=True):
        assert row == list(generate(model, prompt, settings))
        text, draws = list(prompt), torch.Generator().manual_seed(settings.seed)
        for token in row:
            logits = forward(params, np.array([text]), config)[0][0, -1]
            logits = sampling.penalize(logits, text, settings.repetition_penalty)
            probs = sampling.token_probabilities(
                logits, settings.temperature, settings.top_k, settings.top_p
            )
            uniform = torch.rand((), dtype=torch.float64, generator=draws).item()
            below = probs[:token].sum()
            assert below - 1e-9 <= uniform <= below + probs[token] + 1e-9 or probs[token] == 1
            text.append(token)


@pytest.fixture(scope="module")
def small() -> Llama:
    model = Llama(
        ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=12, vocab_size=50)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_generation_ends_at_its_limits_and_its_stop_tokens(small: Llama) -> None:
    long = dataclasses.replace(GREEDY, max_new_tokens=100)
    assert len(list(generate(small, [1] * 9, long))) == 3  # the context holds 12
    assert len(list(generate(small, [1] * 11, long))) == 1
    filled = [
        t.reached_length_limit
        for t in generate_tokens(DecodeBatch(small, [[1] * 9], [SamplingConfig(3)]))
    ]
    assert filled == [False, False, True]
    assert len(list(generate(small, [1], dataclasses.replace(GREEDY, max_new_tokens=2)))) == 2
    (first, *_) = generate(small, [1], GREEDY)
    assert list(generate(small, [1], GREEDY, stop={first})) == []
    for settings in (SamplingConfig(5, temperature=1.0), SamplingConfig(99, temperature=1.0)):
        *others, last = generate(small, [1, 2], settings)
        assert last not in others
        # The last token that is allowed can be one that stops, and is not given out either.
        assert list(generate(small, [1, 2], settings, stop={last})) == others
    for prompt, message in (
        ([], "0 tokens long"),
        ([1] * 12, "12 tokens long"),
        ([50], "outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            DecodeBatch(small, [[1], prompt], [GREEDY, GREEDY])


def test_one_seed_gives_one_text_and_another_seed_another(small: Llama) -> None:
    def write(seed: int) -> list[int]:
        settings = SamplingConfig(max_new_tokens=8, temperature=1.0, seed=seed)
        return list(generate(small, [1, 2], settings))

    assert write(0) == write(0) != write(1)


def test_log_probabilities_are_the_models_own(small: Llama) -> None:
    """Before the penalty, the temperature and the cuts, which change what is drawn."""
    settings = SamplingConfig(
        temperature=0.3, top_k=3, repetition_penalty=1.5, logprobs=2, max_new_tokens=4
    )
    batch, text = DecodeBatch(small, [[3, 4], [5]], [settings, GREEDY]), [3, 4]
    batch.prefill()
    for _ in range(4):
        mine, other = batch.sample()
        logits, _ = small(torch.tensor([text]))
        right = logits[0, -1].double().log_softmax(-1)
        assert mine.logprob == pytest.approx(right[mine.id].item(), abs=1e-5)
        assert [i for i, _ in mine.top_logprobs] == right.topk(2).indices.tolist()
        assert (other.logprob, other.top_logprobs) == (None, ())
        text.append(mine.id)
        batch.decode_one_token()


def test_a_broken_model_says_so(small: Llama) -> None:
    model = Llama(small.config)
    model.load_state_dict(small.state_dict())
    model.model.norm.weight.data[0] = float("nan")
    for settings in (GREEDY, SamplingConfig(6, repetition_penalty=1.3)):
        with pytest.raises(InputError, match="logits are not finite"):
            next(generate(model, [1], settings))


def test_positions_count_a_rows_own_tokens(small: Llama) -> None:
    """Rotations are relative, so that no output would show a row's positions shifted."""
    batch = DecodeBatch(small, [[1, 2, 3], [4]], [GREEDY, GREEDY], decoding="eager")
    batch.prefill()
    assert isinstance(batch.step, EagerStep)
    positions, mask = batch.step._positions_and_mask(2)
    assert positions is not None
    assert mask is not None
    assert positions.tolist() == [[3, 4], [1, 2]]
    assert mask[1].tolist() == [[False, False, True, True, False], [False, False, True, True, True]]


@pytest.mark.parametrize(
    ("rows", "dtype", "capability", "mode"),
    [
        (1, torch.float32, (7, 5), "kernels"),
        (2, torch.bfloat16, (9, 0), "kernels"),
        (64, torch.float16, (8, 0), "kernels"),
        (65, torch.bfloat16, (9, 0), "graph"),
        (2, torch.float16, (7, 5), "graph"),
        (2, torch.float32, (9, 0), "graph"),
    ],
)
def test_the_mode_chosen_on_a_gpu(
    rows: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chosen for a stand-in of a GPU: the choice reads device, dtype, compute capability."""
    weight = SimpleNamespace(device=torch.device("cuda"), itemsize=dtype.itemsize)
    decoder = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    model: Any = SimpleNamespace(model=decoder, modules=list)
    monkeypatch.setattr(numpy_step.NumpyStep, "supports", lambda model: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for version, has_kernels in (("3.6.0", True), ("3.10.1+git", True), ("3.5.1", False)):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        found = decoding.choose_mode("auto", model, rows, 100)
        assert found == (mode if has_kernels else "graph")
    assert decoding.choose_mode("auto", model, rows, 8) == "eager"
    with pytest.raises(InputError, match=r"needs an NVIDIA GPU and triton 3\.6"):
        decoding.choose_mode("kernels", model, rows, 100)
