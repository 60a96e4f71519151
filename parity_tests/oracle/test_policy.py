"""PPO's rewards, advantages and losses: what holds before the first update, and the equations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import policy
from reference_np.config import InputError
from reference_np.divergence import log_probs
from reference_np.masked import join_moments, moments, whiten
from reference_np.ops import Array

from ..conformance.architectures import seeds
from ..support.fine_tuning import agree
from ..support.fine_tuning_cases import CASES, FILLERS, REFERENCE, Answers, answers

pytestmark = pytest.mark.numeric

fillers = st.sampled_from(FILLERS)


# Before the first update


@given(given=answers(least=0), filler=fillers, temperature=st.sampled_from([0.3, 1.0, 2.0]))
def test_before_the_first_update_the_ratio_is_one_and_the_divergence_zero(
    given: Answers, filler: float, temperature: float
) -> None:
    x = given.batch(filler)
    log_p = log_probs(x.logits, x.targets, temperature)
    same = x._replace(
        arrays={
            **x.arrays,
            "log_p": log_p,
            "log_old": log_p,
            "log_ref": log_p,
            "ref_logits": x.logits,
        }
    )
    for name in ("k1", "k2", "k3", "k2_vjp", "k3_vjp", "exact_kl", "exact_kl_vjp"):
        assert not np.any(CASES[name](REFERENCE, same, 1)), name
    count = max(1, policy.loss_count(x.mask))
    loss = policy.policy_loss(log_p, log_p, x.advantages, x.mask, count)
    assert agree(loss, -np.sum(x.advantages[x.mask]) / count)
    gradient = policy.policy_loss_vjp(log_p, log_p, x.advantages, x.mask, count)
    assert agree(gradient[x.mask], -x.advantages[x.mask] / count)
    rewards = policy.kl_rewards(x.scores, log_p, log_p, x.mask, 0.1)
    assert agree(rewards.sum(axis=1), x.scores * x.mask.any(axis=1))


# Rewards and advantages


@given(given=answers(least=0), filler=fillers)
def test_a_rows_rewards_add_up_to_equation_4_with_the_score_at_its_last_token(
    given: Answers, filler: float
) -> None:
    x = given.batch(filler)
    rewards = policy.kl_rewards(x.scores, x.log_p, x.log_ref, x.mask, 0.1)
    for row, found, mask, score in zip(given.rows, rewards, x.mask, x.scores, strict=True):
        own = -0.1 * (row["log_p"] - row["log_ref"])
        assert agree(found[mask][:-1], own[:-1])
        assert agree(found[mask][-1:], own[-1:] + score)
        assert not found[~mask].any()


def sums_of_deltas(row: dict[str, Array], gamma: float, lam: float) -> Array:
    """Return GAE as its definition, a sum over all later steps: no recursion."""
    values = np.append(row["values"], 0.0)
    deltas = row["rewards"] + gamma * values[1:] - values[:-1]
    n = len(deltas)
    return np.array(
        [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
    )


@given(
    given=answers(least=0),
    filler=fillers,
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_advantages_are_the_definitions_sum(
    given: Answers, filler: float, gamma: float, lam: float
) -> None:
    x = given.batch(filler)
    advantages, returns = policy.gae(x.rewards, x.values, x.mask, gamma, lam)
    for row, found, back, mask in zip(given.rows, advantages, returns, x.mask, strict=True):
        expected = sums_of_deltas(row, gamma, lam)
        assert agree(found[mask], expected)
        assert agree(back[mask], expected + row["values"])
        assert not found[~mask].any()
        assert not back[~mask].any()


# Groups


@given(seed=seeds, size=st.integers(1, 6), loo=st.booleans(), unbiased=st.booleans())
def test_a_group_of_equal_rewards_teaches_nothing(
    seed: int, size: int, loo: bool, unbiased: bool
) -> None:
    """Exactly, in either precision; NaN in the rewards of answers that do not count."""
    rng = np.random.default_rng(seed)
    rewards = np.repeat(1e3 * rng.standard_normal((3, 1)), size, axis=1)
    mask = rng.random((3, size)) < 0.8
    rewards[~mask] = np.nan
    for dtype in (np.float32, np.float64):
        found = policy.group_advantage(
            rewards.astype(dtype), mask, leave_one_out=loo, unbiased=unbiased
        )
        assert found.dtype == dtype
        assert not found.any()
        assert not whiten(rewards[0].astype(dtype), mask[0]).any()


@given(seed=seeds, size=st.integers(3, 6), unbiased=st.booleans(), divide=st.booleans())
def test_a_groups_advantages_are_the_formula(
    seed: int, size: int, unbiased: bool, divide: bool
) -> None:
    rng = np.random.default_rng(seed)
    rewards, mask = rng.standard_normal((4, size)), rng.random((4, size)) < 0.9
    rewards[~mask] = np.inf
    options = {"unbiased": unbiased, "divide": divide}
    group = policy.group_advantage(rewards, mask, **options)
    others = policy.group_advantage(rewards, mask, leave_one_out=True, **options)
    for b, g in zip(*np.nonzero(mask), strict=True):
        for found, chosen in ((group, mask[b]), (others, mask[b] & (np.arange(size) != g))):
            own = rewards[b, chosen]
            std = own.std(ddof=unbiased) if divide and len(own) > 1 else 1.0
            expected = (rewards[b, g] - own.mean()) / std if len(own) else 0.0
            assert agree(found[b, g], expected)
    assert not group[~mask].any()
    assert not others[~mask].any()


def test_the_deviation_of_large_rewards_is_not_lost_in_float32() -> None:
    rewards = np.array([[1000.0, 1000.25, 1000.5, 1000.25]], np.float32)
    found = policy.group_advantage(rewards, np.ones((1, 4), bool), leave_one_out=True)
    own = rewards[0].astype(float)
    for g in range(4):
        others = np.delete(own, g)
        assert abs(found[0, g] - (own[g] - others.mean()) / others.std()) <= 1e-6


# Whitening


@given(given=answers(least=0), filler=fillers, mean=st.sampled_from(["removed", "kept"]))
def test_whitening_is_of_the_real_values_wherever_they_are(
    given: Answers, filler: float, mean: str
) -> None:
    x = given.batch(filler)
    found = whiten(x.values, x.mask, mean=mean)
    own = np.concatenate([row["values"] for row in given.rows])
    shift = own.mean() if own.size else 0.0
    expected = (own - shift) / np.sqrt((own.var() if own.size else 0) + 1e-8)
    assert agree(found[x.mask], expected + shift if mean == "kept" else expected)
    assert not found[~x.mask].any()
    joint = join_moments([moments(v, m) for v, m in zip(x.values, x.mask, strict=True)])
    split = [whiten(v, m, joint=joint, mean=mean) for v, m in zip(x.values, x.mask, strict=True)]
    assert agree(np.stack(split), found)


@given(value=st.floats(-1e3, 1e3), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_equal_values_spread_over_processes_whiten_to_nothing(
    value: float, sizes: list[int]
) -> None:
    """Exactly, as those of one process; and the moments of one part are its own."""
    parts = [np.full(size, value) for size in sizes]
    masks = [np.ones(size, bool) for size in sizes]
    each = [moments(part, mask) for part, mask in zip(parts, masks, strict=True)]
    joint = join_moments(each)
    assert all(join_moments([own]) == own for own in each)
    for part, mask in zip(parts, masks, strict=True):
        assert not whiten(part, mask, joint=joint).any()


def test_what_whitening_cannot_do_is_refused() -> None:
    one = np.ones(1), np.ones(1, bool)
    with pytest.raises(InputError, match="mean: 'shifted'; choose 'removed' or 'kept'"):
        whiten(*one, mean="shifted")
    with pytest.raises(InputError, match="one value has no unbiased variance"):
        whiten(*one, unbiased=True)


# Losses


def of_token(log_p: float, old: float, advantage: float, clip: float = 0.2) -> float:
    ratio = np.exp(log_p - old)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


@given(given=answers(least=0), filler=fillers)
def test_the_policys_loss_is_the_equation_in_either_mean(given: Answers, filler: float) -> None:
    x = given.batch(filler)
    rows = [
        [of_token(*own) for own in zip(r["log_p"], r["log_old"], r["advantages"], strict=True)]
        for r in given.rows
    ]
    of_tokens = np.mean(np.concatenate(rows)) if any(rows) else 0.0
    of_rows = np.mean([np.mean(row) for row in rows if row]) if any(rows) else 0.0
    for mean, expected in (("token", of_tokens), ("sequence", of_rows)):
        count = policy.loss_count(x.mask, mean)
        assert count == (sum(map(len, rows)) if mean == "token" else sum(map(bool, rows)))
        if count:
            found = policy.policy_loss(x.log_p, x.log_old, x.advantages, x.mask, count, mean=mean)
            assert agree(found, expected)


@given(given=answers(), filler=fillers, clip=st.sampled_from([None, 0.1, 0.5]))
def test_the_values_loss_is_the_equation_with_and_without_clip(
    given: Answers, filler: float, clip: float | None
) -> None:
    x = given.batch(filler)
    old = None if clip is None else x.old_values
    count = policy.loss_count(x.mask)
    found = policy.value_loss(x.values, x.returns, x.mask, count, old_values_BT=old, clip=clip)
    value, back, before = x.values[x.mask], x.returns[x.mask], x.old_values[x.mask]
    losses = (value - back) ** 2 / 2
    if clip is not None:
        near = np.minimum(np.maximum(value, before - clip), before + clip)
        losses = np.maximum(losses, (near - back) ** 2 / 2)
    assert agree(found, losses.mean())


@given(seed=seeds)
def test_a_value_within_its_clip_has_the_unclipped_loss_and_gradient(seed: int) -> None:
    """To the bit: V_old + (V - V_old) may round away from V, and took the gradient with it."""
    rng = np.random.default_rng(seed)
    values, returns, inside = *rng.standard_normal((2, 4, 500)), rng.uniform(-0.19, 0.19, (4, 500))
    mask = np.ones(values.shape, bool)
    for dtype in (np.float32, np.float64):
        given = values.astype(dtype), returns.astype(dtype), mask, 2000
        clip = {"old_values_BT": (values + inside).astype(dtype), "clip": 0.2}
        assert policy.value_loss(*given, **clip) == policy.value_loss(*given)
        assert np.array_equal(policy.value_loss_vjp(*given, **clip), policy.value_loss_vjp(*given))


def test_names_and_options_that_do_not_fit_are_refused() -> None:
    ones = np.ones((1, 2))
    mask = ones > 0
    with pytest.raises(InputError, match="mean: 'batch'; choose 'token' or 'sequence'"):
        policy.policy_loss(ones, ones, ones, mask, 2, mean="batch")
    with pytest.raises(InputError, match="give both, or neither"):
        policy.value_loss(ones, ones, mask, 2, clip=0.2)
    with pytest.raises(InputError, match="count: 0"):
        policy.policy_loss(ones, ones, ones, mask, 0)
