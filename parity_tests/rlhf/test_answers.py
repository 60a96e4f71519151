"""Answers drawn on few rows are those that each prompt has alone, with log-probabilities."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.inference import cuda_graph, decoding
from llama_torch.inference.config import Decoding, SamplingConfig
from llama_torch.inference.engine import DecodeBatch, generate_tokens
from llama_torch.inference.rows import finish_reason
from llama_torch.model.llama import Llama
from llama_torch.rlhf.answers import Answer, draw_answers, sample_seed
from reference_np import divergence
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.sampling import token_probabilities

from ..backends.torch_model import torch_model
from ..conformance.architectures import configs, seeds
from ..conformance.drawn import Draw, composite, labelled
from ..conformance.strategies import Array, random_params
from ..support import recorded_graphs

pytestmark = pytest.mark.numeric

CLOSE = 1e-9
ON_GPU = torch.cuda.is_available()
CONFIG = LlamaConfig(12, 2, 3, 1, 4, 20, 23, 40)
ENDS = {3, 11}


def answers_of(
    model: Llama,
    prompts: list[list[int]],
    settings: list[SamplingConfig],
    rows: int,
    decoding: Decoding = "auto",
) -> list[Answer]:
    """Return the answers in the prompts' order."""
    found = [*draw_answers(model, prompts, settings, ENDS, rows, decoding=decoding)]
    assert sorted(answer.prompt for answer in found) == list(range(len(prompts)))
    return sorted(found)


def oracle_log_probs(
    params: dict[str, Array], config: LlamaConfig, prompt: list[int], answer: Answer, t: float
) -> Array:
    """Return the log-probabilities of an answer's tokens by one pass over the whole of it."""
    tokens = np.array([prompt + answer.ids])
    logits = forward(params, tokens, config)[0][:, :-1]
    return divergence.log_probs(logits, tokens[:, 1:], t)[0, len(prompt) - 1 :]


def same(found: Answer, expected: Answer) -> bool:
    return (found.ids, found.is_ended) == (expected.ids, expected.is_ended) and np.allclose(
        found.log_probs, expected.log_probs, rtol=0, atol=CLOSE
    )


@composite
def cases(draw: Draw) -> Any:
    config = dataclasses.replace(draw(configs()), max_seq_len=draw(st.integers(12, 24)))
    ids = st.integers(0, config.vocab_size - 1)
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=11), min_size=3, max_size=9))
    lengths = [draw(st.integers(1, 9), label="new tokens") for _ in prompts]
    params = random_params(config, draw(seeds, label="weights seed"))
    return labelled((config, params, prompts, lengths), draw.numbers)


@given(case=cases(), rows=st.integers(1, 4), t=st.sampled_from([0.7, 1.0, 1.3]), data=st.data())
def test_an_answer_is_its_prompts_and_seeds_alone(
    case: Any, rows: int, t: float, data: st.DataObject
) -> None:
    """On any number of rows, in any order, amid prompts that are longer, shorter, or the same."""
    config, params, prompts, lengths = case
    model = torch_model(config, params)
    order = data.draw(st.permutations(range(len(prompts))))
    each = [
        SamplingConfig(n, temperature=t, top_p=1.0, seed=sample_seed(5, i))
        for i, n in enumerate(lengths)
    ]
    found = answers_of(model, [prompts[i] for i in order], [each[i] for i in order], rows)
    for i, answer in zip(order, found, strict=True):
        [alone] = answers_of(model, [prompts[i]], [each[i]], 1, "eager")
        assert same(answer, alone)
        right = oracle_log_probs(params, config, prompts[i], answer, t)
        np.testing.assert_allclose(answer.log_probs, right, rtol=0, atol=CLOSE)
        limit = min(lengths[i], config.max_seq_len - len(prompts[i]))
        assert answer.is_ended == (answer.ids[-1] in ENDS)
        assert len(answer.ids) == limit or answer.is_ended
        assert not ENDS & {*answer.ids[:-1]}


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("decoding", ["eager", "native", "numpy"])
def test_filters_and_penalties_are_each_rows_own(rows: int, decoding: Decoding) -> None:
    """The log-probability is of the distribution that is left after penalty, top-k and top-p."""
    if decoding == "numpy" and rows > 1:
        pytest.skip("one row at a time")
    params = random_params(CONFIG, 3)
    model, rng = torch_model(CONFIG, params), random.Random(7)
    prompts = [[rng.randrange(23) for _ in range(rng.randrange(1, 20))] for _ in range(12)]
    kinds = [{"temperature": 0.0}, {"top_p": 0.6}, {"top_k": 4, "repetition_penalty": 1.3}, {}]
    each = [
        SamplingConfig(**{"max_new_tokens": 8, "top_p": 1.0, "seed": i} | kinds[i % 4])
        for i in range(12)
    ]
    found = answers_of(model, prompts, each, rows, decoding)
    for prompt, settings, answer in zip(prompts, each, found, strict=True):
        assert same(answer, answers_of(model, [prompt], [settings], 1, "eager")[0])
        if settings.repetition_penalty == 1:
            logits = forward(params, np.array([prompt + answer.ids]), CONFIG)[0][0]
            for n, (id_, log_prob) in enumerate(zip(answer.ids, answer.log_probs, strict=True)):
                filters = settings.temperature, settings.top_k, settings.top_p
                p = token_probabilities(logits[len(prompt) - 1 + n], *filters)[id_]
                assert log_prob == pytest.approx(np.log(p), abs=CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "mode", ["graph", pytest.param("kernels", marks=pytest.mark.skipif(not ON_GPU, reason="CPU"))]
)
def test_captured_steps_refill_rows_too(
    mode: Decoding, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that were launched before the host knew which rows end; on a CPU, recorded ones."""
    model, rng = torch_model(CONFIG, random_params(CONFIG, 3)), random.Random(7)
    prompts = [[rng.randrange(23) for _ in range(rng.randrange(1, 20))] for _ in range(14)]
    each = [
        SamplingConfig(rng.randrange(1, 16), 1.0, top_p=1.0, seed=i, repetition_penalty=1 + i % 2)
        for i in range(14)
    ]
    expected = answers_of(model, prompts, each, 14, "eager")
    if not ON_GPU:
        recorded_graphs.install(monkeypatch)
        monkeypatch.setattr(cuda_graph, "CACHE_MULTIPLE", 1)
        monkeypatch.setattr(decoding, "choose_mode", lambda mode, *_: mode)
        monkeypatch.setattr(DecodeBatch, "_read_ahead", recorded_graphs.read_ahead)
    model.to(torch.device("cuda" if ON_GPU else "cpu"))
    found = answers_of(model, prompts, each, rows, mode)
    assert all(map(same, found, expected))
    assert {answer.is_ended for answer in found} == {False, True}


def test_rows_are_kept_busy() -> None:
    """While prompts wait, hardly a row is idle: batches one after the other leave half of them."""
    model, rng = torch_model(CONFIG, random_params(CONFIG, 3)), random.Random(1)
    prompts = [[rng.randrange(23) for _ in range(5)] for _ in range(120)]
    each = [SamplingConfig(30, temperature=1.0, top_p=1.0, seed=i) for i in range(120)]
    batch, working = DecodeBatch(model, prompts, each, max_rows=8), []
    sample = batch.sample

    def counted() -> Any:
        if batch.waiting:
            working.append(sum(not row.is_finished for row in batch.rows))
        assert len(batch.rows) <= 8
        return sample()

    batch.sample = counted  # type: ignore[method-assign]
    for _ in generate_tokens(batch, lambda token: finish_reason(token, ENDS)):
        pass
    assert len(working) > 50
    assert np.mean(working) > 7.9


def test_equal_prompts_are_run_once() -> None:
    params = random_params(CONFIG, 3)
    model, seen = torch_model(CONFIG, params), []
    prompts = [[1, 2, 3]] * 4 + [[4, 5, 6, 7]] * 4
    each = [SamplingConfig(6, temperature=1.0, top_p=1.0, seed=i) for i in range(8)]
    hook = model.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    found = answers_of(model, prompts, each, 8, "eager")
    hook.remove()
    assert seen[0] == (2, 4)
    assert len({tuple(answer.ids) for answer in found}) > 6
    for prompt, settings, answer in zip(prompts, each, found, strict=True):
        assert same(answer, answers_of(model, [prompt], [settings], 1, "eager")[0])


def test_a_model_in_training_answers_by_its_weights_of_now() -> None:
    model = torch_model(CONFIG, random_params(CONFIG, 3)).train()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    prompts, settings = [[1, 2], [3], [4, 5, 6]], [SamplingConfig(6, 1.0, top_p=1.0, seed=4)] * 3
    for _ in range(2):
        found = answers_of(model, prompts, settings, 2)
        params = {name: p.detach().numpy() for name, p in model.named_parameters()}
        for prompt, answer in zip(prompts, found, strict=True):
            right = oracle_log_probs(params, CONFIG, prompt, answer, 1.0)
            np.testing.assert_allclose(answer.log_probs, right, rtol=0, atol=CLOSE)
        model(torch.tensor(prompts[:1]))[0].logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.training
    assert weights == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_nothing_is_drawn_for_no_prompt() -> None:
    assert [*draw_answers(torch_model(CONFIG, random_params(CONFIG, 3)), [], [], ENDS)] == []


def test_each_prompt_and_sample_has_a_seed_of_its_own() -> None:
    found = {sample_seed(seed, i, j) for seed in (0, 1) for i in range(20) for j in range(20)}
    assert len(found) == 800
    assert all(0 <= seed < 2**63 for seed in found)
    assert sample_seed(0, 1, 2) != sample_seed(0, 12)
    assert sample_seed(3, 1, 2) == sample_seed(3, 1, 2)
