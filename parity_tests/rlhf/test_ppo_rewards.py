"""Rewards, advantages and whitening in torch are the oracle's, wherever the drawn tokens stand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.distributed.parallel import Parallel
from llama_torch.rlhf import ppo_rewards
from reference_np import masked, policy

from ..conformance.architectures import seeds
from ..support.fine_tuning_cases import LAYOUTS, Batch, answers_of

pytestmark = pytest.mark.numeric

CLOSE = 1e-12
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def tensors(batch: Batch, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(getattr(batch, name)) for name in names]


@given(lengths=lengths, layout=st.sampled_from(LAYOUTS), seed=seeds, nan=st.booleans())
def test_they_are_the_oracles_in_any_layout(
    lengths: list[int], layout: str, seed: int, nan: bool
) -> None:
    """With padding on either side and with holes, whatever stands there."""
    batch = answers_of(lengths, layout, seed).batch(np.nan if nan else 1e3)
    mask = torch.from_numpy(batch.mask)
    scores = torch.from_numpy(batch.scores)
    log_p, log_ref, values = tensors(batch, "log_p", "log_ref", "values")
    given_np = batch.scores, batch.log_p, batch.log_ref, batch.mask, 0.3
    rewards_np = policy.kl_rewards(*given_np)
    rewards = ppo_rewards.kl_rewards(scores, log_p, log_ref, mask, 0.3)
    right = policy.gae(rewards_np, batch.values, batch.mask, 0.9, 0.8)
    found = ppo_rewards.gae(rewards, values, mask, 0.9, 0.8)
    pairs: list[tuple[Any, Any]] = [(rewards, rewards_np), *zip(found, right, strict=True)]
    pairs.append((ppo_rewards.whiten(values, mask, Parallel()), masked.whiten(*whitened(batch))))
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=CLOSE, atol=CLOSE)


def whitened(batch: Batch) -> tuple[Any, Any]:
    return batch.values, batch.mask


@given(seed=seeds, groups=st.integers(1, 4), size=st.integers(1, 5), far=st.sampled_from([0, 1e3]))
def test_groups_are_the_oracles(seed: int, groups: int, size: int, far: float) -> None:
    """Of rewards that are large beside their differences too; of equal ones exactly 0."""
    rng = np.random.default_rng(seed)
    rewards = far + rng.integers(0, 3, (groups, size)) / 4
    found = ppo_rewards.group_advantages(torch.from_numpy(rewards)).numpy()
    right = policy.group_advantage(rewards, np.ones(rewards.shape, bool))
    np.testing.assert_allclose(found, right, rtol=CLOSE, atol=1e-9)
    equal = rewards.max(axis=1) == rewards.min(axis=1)
    assert not found[equal].any()
