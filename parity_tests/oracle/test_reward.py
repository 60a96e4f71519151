"""The reward model's losses and margins, and the reward made of two models' scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import reward
from reference_np.config import InputError
from reference_np.masked import join_moments, moments
from reference_np.ops import IGNORE, Array

from ..conformance.architectures import seeds
from ..support.fine_tuning import agree, pad_rows

pytestmark = pytest.mark.numeric


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def test_margins_are_the_papers() -> None:
    strengths = ("significantly", "better", "slightly", "negligibly")
    assert [reward.margin(s, "small") for s in strengths] == [1, 2 / 3, 1 / 3, 0]
    assert [reward.margin(s, "large") for s in strengths] == [3, 2, 1, 0]
    with pytest.raises(InputError, match=r"strength: 'slight'; choose one of significantly, "):
        reward.margin("slight", "small")
    with pytest.raises(InputError, match="scale: 'middle'; choose one of small, large"):
        reward.margin("better", "middle")


@given(seed=seeds, size=st.integers(1, 6))
def test_the_pair_loss_is_the_equation_and_adds_up_over_any_split(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    chosen, rejected = 2 * rng.standard_normal((2, size))
    margins = np.array(
        [reward.margin(s, "large") for s in rng.choice(["better", "slightly"], size)]
    )
    loss = reward.pair_loss(chosen, rejected, margins, 7)
    assert agree(loss, -np.sum(np.log(sigmoid(chosen - rejected - margins))) / 7)
    cut = rng.integers(0, size + 1)
    parts = [slice(0, cut), slice(cut, size)]
    assert agree(loss, sum(reward.pair_loss(chosen[p], rejected[p], margins[p], 7) for p in parts))
    for found, own in zip(
        reward.pair_loss_vjp(chosen, rejected, margins, 7),
        zip(
            *(reward.pair_loss_vjp(chosen[p], rejected[p], margins[p], 7) for p in parts),
            strict=True,
        ),
        strict=True,
    ):
        assert agree(found, np.concatenate(own))


def test_a_large_gap_overflows_nothing() -> None:
    gaps = np.array([1e4, -1e4, 800.0, -800.0])
    zeros = np.zeros(4)
    assert agree(reward.pair_loss(gaps, zeros, zeros, 1), 1e4 + 800)
    assert reward.pair_loss_vjp(gaps, zeros, zeros, 1)[0].tolist() == [0, -1, 0, -1]


@pytest.mark.parametrize("shapes", [((2, 1), (2, 1), (2,)), ((2,), (2,), (2, 1)), ((2,), (2,), ())])
def test_scores_and_margins_of_other_shapes_are_refused(
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    arrays = [np.zeros(shape) for shape in shapes]
    for function in (reward.pair_loss, reward.pair_loss_vjp):
        with pytest.raises(InputError, match=r"shapes .*; each must be \[B\]"):
            function(*arrays, 2)


@given(seed=seeds)
def test_the_safety_loss_is_binary_cross_entropy_of_the_labelled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.standard_normal(6), rng.choice([0, 1, IGNORE], 6)
    scores[labels == IGNORE] = np.nan
    loss = reward.safety_loss(scores, labels, 4)
    p = sigmoid(scores)
    assert agree(loss, -(np.log(p[labels == 1]).sum() + np.log(1 - p[labels == 0]).sum()) / 4)
    d_scores = reward.safety_loss_vjp(scores, labels, 4)
    assert agree(d_scores[labels != IGNORE], ((p - labels) / 4)[labels != IGNORE])
    assert not d_scores[labels == IGNORE].any()
    parts = [reward.safety_loss(scores[i : i + 2], labels[i : i + 2], 4) for i in (0, 2, 4)]
    assert agree(loss, sum(parts))


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), left=st.booleans(), seed=seeds)
def test_a_score_is_the_last_tokens_however_it_is_padded(
    lengths: list[int], left: bool, seed: int
) -> None:
    rows = [np.random.default_rng(seed + i).standard_normal(n) for i, n in enumerate(lengths)]
    values = pad_rows(rows, np.nan, left, extra=2)
    mask = pad_rows([np.ones(n, bool) for n in lengths], False, left, extra=2)
    assert reward.score_at(values, mask).tolist() == [row[-1] for row in rows]


def test_a_row_without_a_real_token_has_no_score() -> None:
    mask = np.array([[True, False], [False, False]])
    with pytest.raises(InputError, match="row 1 has no real token"):
        reward.score_at(np.zeros((2, 2)), mask)


@given(seed=seeds)
def test_the_safety_score_counts_where_it_is_low_or_the_prompt_is_tagged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    helpful, safe = 3 * rng.standard_normal((2, 8))
    tagged = rng.random(8) < 0.3
    expected = [
        s if t or 1 / (1 + np.exp(-s)) < 0.15 else h
        for h, s, t in zip(helpful, safe, tagged, strict=True)
    ]
    scores = reward.combined_score(helpful, safe, tagged)
    assert scores.tolist() == expected
    whole = reward.combined_reward(helpful, safe, tagged)
    assert agree(whole.mean(), 0)
    assert agree(whole, (scores - scores.mean()) / np.sqrt(scores.var() + 1e-8))
    parts = [slice(0, 3), slice(3, 8)]
    joint = join_moments([moments(scores[p], np.ones(len(scores[p]), bool)) for p in parts])
    split = [reward.combined_reward(helpful[p], safe[p], tagged[p], joint) for p in parts]
    assert agree(np.concatenate(split), whole)


def test_the_threshold_is_of_the_safety_score_after_sigmoid() -> None:
    edge = np.log(0.15 / 0.85)
    safe = np.array([edge - 1e-9, edge + 1e-9, 0.1])
    found = reward.combined_score(np.full(3, 9.0), safe, np.zeros(3, bool))
    assert found.tolist() == [edge - 1e-9, 9.0, 9.0]
