"""Samplers held to the oracle's distribution, and the draws to it by a chi-squared test."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llama_common.errors import InputError
from llama_torch.inference.config import SamplingConfig
from llama_torch.inference.sampling import SamplingTensors, draw, penalize, token_probabilities
from reference_np import sampling as oracle

from ..conformance.strategies import Array

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
# Distinct integers, so that no rounding decides what is cut; two precisions.
rows_of_logits = st.integers(1, 30).flatmap(
    lambda size: st.lists(
        arrays(np.float32, size, elements=st.integers(-20, 20), unique=True),
        min_size=1,
        max_size=4,
    )
)
settings = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.just(0) | st.integers(1, 35),
    top_p=st.sampled_from([1.0, 0.871, 0.333, 1e-6]),
    min_p=st.just(0.0) | st.sampled_from([0.0123, 0.31, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.31]),
)


def oracle_distribution(logits: Array, seen: Array, row: SamplingConfig) -> Array:
    lower = oracle.penalize(logits, np.flatnonzero(seen), row.repetition_penalty)
    return oracle.token_probabilities(lower, row.temperature, row.top_k, row.top_p, row.min_p)


@given(rows=rows_of_logits, data=st.data())
def test_every_row_has_the_oracles_distribution(rows: list[Array], data: st.DataObject) -> None:
    """Rows with different settings in one batch, all the settings together."""
    each = [data.draw(settings, label="settings") for _ in rows]
    shape = len(rows), len(rows[0])
    seen = np.random.default_rng(data.draw(st.integers(0, 99), label="seen")).random(shape) < 0.3
    tensors = SamplingTensors.from_configs(each, CPU)
    logits = torch.from_numpy(np.stack(rows))
    logits = penalize(logits, torch.from_numpy(seen), tensors.repetition_penalty)
    found = token_probabilities(logits, tensors).numpy()
    for i, row in enumerate(each):
        right = oracle_distribution(rows[i], seen[i], row)
        np.testing.assert_allclose(found[i], right, rtol=1e-9, atol=1e-15)
        assert np.array_equal(found[i] > 0, right > 0)
        assert found[i].sum() == pytest.approx(1, abs=1e-12)


@given(
    logits=arrays(np.float32, (3, 9), elements=st.floats(-30, 30, width=32)),
    seen=arrays(np.bool_, (3, 9)),
    penalties=st.lists(st.sampled_from([0.7, 1.0, 1.31]), min_size=3, max_size=3),
)
def test_the_penalty_is_the_oracles(logits: Array, seen: Array, penalties: list[float]) -> None:
    rows = torch.tensor(penalties, dtype=torch.float64)[:, None]
    found = penalize(torch.from_numpy(logits), torch.from_numpy(seen), rows).numpy()
    for row, mask, penalty, result in zip(logits, seen, penalties, found, strict=True):
        assert np.array_equal(result, oracle.penalize(row, np.flatnonzero(mask), penalty))


def test_the_oracle_on_numbers_worked_by_hand() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    probabilities = oracle.token_probabilities
    np.testing.assert_allclose(probabilities(logits), [0.5, 0.25, 0.15, 0.1])
    np.testing.assert_allclose(probabilities(logits, 0.5)[:2], np.array([0.25, 0.0625]) / 0.345)
    np.testing.assert_allclose(probabilities(logits, top_k=2), [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(probabilities(logits, top_p=0.74), [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(probabilities(logits, top_p=0.76)[2:], [0.15 / 0.9, 0])
    np.testing.assert_allclose(probabilities(logits, min_p=0.29)[2:], [0.15 / 0.9, 0])
    # top-p holds its share of what top-k left: 2/3 is enough for 0.6.
    np.testing.assert_allclose(probabilities(logits, top_k=2, top_p=0.6), [1, 0, 0, 0])
    assert probabilities(np.array([1.0, 3.0, 3.0]), 0.0).tolist() == [0, 1, 0]
    assert oracle.penalize(np.array([2.0, -2.0, 1.0]), np.array([0, 1, 1]), 2.0).tolist() == [
        1,
        -4,
        1,
    ]


def test_all_means_all_and_tiny_temperatures_are_greedy() -> None:
    logits = 3 * torch.randn(1, 50257, generator=torch.Generator().manual_seed(0))
    for temperature, kept in ((1.0, 50257), (1e-45, 1), (1e-300, 1), (1e-310, 1)):
        row = SamplingConfig(temperature=temperature, top_p=1.0)
        probs = token_probabilities(logits, SamplingTensors.from_configs([row], CPU))[0]
        assert (probs > 0).sum() == kept
        assert probs.argmax() == logits[0].argmax()


@pytest.mark.parametrize(
    ("logits", "row", "kept"),
    [
        # Four of a quarter each: the set that holds the share exactly is enough.
        ([0.0] * 4, {"top_p": 0.5}, 2),
        ([0.0] * 4, {"top_p": 0.75}, 3),
        ([0.0] * 4, {"top_p": 0.7500001}, 4),
        ([0.0] * 4, {"top_p": 1.0, "min_p": 1.0}, 4),  # as likely as the likeliest
        ([0.0] * 4 + [-1e-9], {"top_p": 1.0, "min_p": 1.0}, 4),
        ([0.0] * 4, {"top_p": 0.5, "top_k": 3}, 2),  # two thirds
        ([0.0] * 4, {"top_p": 1.0, "top_k": 4}, 4),
        ([60.0, 0.0, -1.0], {"top_p": 1.0}, 3),  # the first holds 1, rounded
    ],
)
def test_tokens_exactly_at_the_limits_of_top_p_and_min_p(
    logits: list[float], row: dict[str, Any], kept: int
) -> None:
    settings = SamplingConfig(temperature=1.0, **row)
    found = token_probabilities(
        torch.tensor([logits]), SamplingTensors.from_configs([settings], CPU)
    )[0]
    assert (found > 0).tolist() == [i < kept for i in range(len(logits))]
    right = oracle.token_probabilities(np.array(logits, np.float32), 1.0, **row)
    np.testing.assert_allclose(found, right, rtol=1e-12)


@given(
    weights=arrays(np.float64, st.integers(1, 20), elements=st.sampled_from([0.0, 1e-12, 0.3, 1])),
    uniform=st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53]),
)
@example(np.array([0.0, 0.7, 0.3]), 0.0)  # the sum that the draw is equal to is passed later
@example(np.array([0.3, 0.7, 0.0, 0.0]), 1 - 2**-53)
def test_a_draw_never_takes_what_was_cut(weights: Array, uniform: float) -> None:
    weights[-len(weights) // 2] = 0.7  # something to draw
    probs = torch.from_numpy(weights / weights.sum())
    token = int(draw(probs[None], torch.tensor([uniform], dtype=torch.float64)))
    assert probs[token] > 0
    below = float(probs[:token].sum())
    assert below - 1e-12 <= uniform <= below + float(probs[token]) + 1e-12


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20,000 draws from 12 tokens.

    The seed is fixed, so the test never fails by chance once it has passed; with another seed
    an honest sampler would exceed this limit once in a million times (chi-squared, 11 degrees
    of freedom: 51.0). A sampler off by 5% of its likeliest token exceeds it by far.
    """
    logits = np.linspace(-2, 1, 12)
    right = oracle.token_probabilities(logits, temperature=0.9)
    row = SamplingConfig(temperature=0.9, top_p=1.0)
    probs = token_probabilities(
        torch.from_numpy(logits)[None], SamplingTensors.from_configs([row], CPU)
    )
    n = 20_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    counts = np.bincount(draw(probs.expand(n, -1), uniform).numpy(), minlength=12)

    def distance(expected: Array) -> float:
        return float(((counts - n * expected) ** 2 / (n * expected)).sum())

    assert distance(right) < 51.0
    skewed = right.copy()
    skewed[-1] *= 0.9
    assert distance(skewed / skewed.sum()) > 51.0  # the test has the power to see it


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"min_p": -0.1}, "--min-p"),
        ({"min_p": 1.5}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"repetition_penalty": float("inf")}, "--repetition-penalty"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"seed": -1}, "--seed"),
        ({"logprobs": -2}, "--logprobs"),
        ({"stop": ("",)}, "--stop"),
    ],
)
def test_a_setting_out_of_range_names_its_flag(change: dict, flag: str) -> None:
    with pytest.raises(InputError, match=f"^{flag} "):
        SamplingConfig(**change)
