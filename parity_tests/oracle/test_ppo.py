"""A batch of PPO in the oracle: its gradients, and what padding and order may change: nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from reference_np import divergence, ppo
from reference_np.config import LlamaConfig
from reference_np.ops import IGNORE, Array
from reference_np.optim import Hyperparameters, init_state
from reference_np.ppo import VALUE, Drawn, Learnt, Settings, ppo_batch

from ..conformance.strategies import random_params

pytestmark = pytest.mark.numeric

CONFIG = LlamaConfig(8, 2, 2, 1, 4, 12, 19, 16)
HYPER = Hyperparameters(lr=1e-2, grad_clip=0.3)
MINIBATCHES = [[0, 1], [2, 3], [4, 5]]
KINDS: dict[str, Settings] = {
    "paper": Settings(),
    "loss": Settings(kl="loss", mean="sequence", beta=0.4, temperature=0.7, value_weight=0.5),
    "group": Settings(group=2, beta=0.5),
}


def case(tied: bool, has_value: bool, padding: int = 0) -> tuple[Any, dict[str, Array], Drawn]:
    """Return a config, parameters, and six answers of one to five tokens."""
    config, rng = dataclasses.replace(CONFIG, tie_embeddings=tied), np.random.default_rng(0)
    params = random_params(config, 1)
    value = rng.standard_normal((1, config.dim))
    params = {**params, VALUE: value} if has_value else params
    tokens = rng.integers(0, config.vocab_size, (6, 9))
    targets = np.full(tokens.shape, IGNORE)
    for row, length in enumerate((1, 5, 3, 2, 4, 5)):
        targets[row, 3 : 3 + length] = tokens[row, 4 : 4 + length]
    scores = rng.standard_normal(6)
    other, _, _ = ppo.outputs(random_params(config, 2), tokens, config)
    log_reference = divergence.log_probs(other, targets)
    more = ((0, 0), (0, padding))
    tokens, log_reference = np.pad(tokens, more), np.pad(log_reference, more, constant_values=5.0)
    targets = np.pad(targets, more, constant_values=IGNORE)
    return config, params, Drawn(tokens, targets, scores, log_reference)


def moved(params: dict[str, Array], seed: int) -> dict[str, Array]:
    """Return parameters nearby: those that drew, of a policy that has been updated since."""
    rng = np.random.default_rng(seed)
    return {name: p + 0.02 * rng.standard_normal(p.shape) for name, p in params.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_the_losss(kind: str, tied: bool) -> None:
    settings = KINDS[kind]
    config, params, drawn = case(tied, not settings.group)
    learnt = ppo.learn_from(moved(params, 3), drawn, config, settings)
    update, grads = ppo.losses_and_grads(params, drawn, learnt, config, settings)
    assert grads.keys() == params.keys()
    assert update.clipped < 0.5
    rng, step = np.random.default_rng(4), 1e-6
    for name, p in params.items():
        along = rng.standard_normal(p.shape)
        either = [
            ppo.losses_and_grads(
                {**params, name: p + sign * step * along}, drawn, learnt, config, settings
            )[0].loss
            for sign in (1, -1)
        ]
        slope = (either[0] - either[1]) / (2 * step)
        assert slope == pytest.approx(float(np.sum(grads[name] * along)), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_order_within_a_minibatch_change_nothing(kind: str) -> None:
    settings = KINDS[kind]
    config, params, drawn = case(True, not settings.group)
    given = config, HYPER, settings
    right = ppo_batch(params, init_state(params), drawn, MINIBATCHES, *given)
    wider = case(True, not settings.group, padding=4)[2]
    swapped = [list(reversed(rows)) for rows in MINIBATCHES]
    for other, rows in ((wider, MINIBATCHES), (drawn, swapped)):
        found = ppo_batch(params, init_state(params), other, rows, *given)
        for name, p in right[0].items():
            np.testing.assert_allclose(found[0][name], p, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found[2], right[2], rtol=0, atol=1e-10)
    assert right[1].step == 3


def test_the_first_update_begins_at_a_ratio_of_one() -> None:
    """Its loss is minus the mean advantage; of whitened ones, of all answers, that is 0."""
    config, params, drawn = case(False, True)
    settings = Settings(value_weight=0.0)
    learnt = ppo.learn_from(params, drawn, config, settings)
    update, _ = ppo.losses_and_grads(params, drawn, learnt, config, settings)
    assert update.loss == pytest.approx(0.0, abs=1e-12)
    assert update.clipped == 0
    mask = drawn.targets != IGNORE
    assert learnt.advantages[mask].std() == pytest.approx(1, abs=1e-6)
    assert not learnt.advantages[~mask].any()


def test_without_a_value_head_equal_rewards_teach_nothing() -> None:
    config, params, drawn = case(True, False)
    settings = Settings(group=3, kl="loss", beta=0.0)
    equal = drawn._replace(scores=np.repeat([1.5, -2.0], 3))
    learnt = ppo.learn_from(params, equal, config, settings)
    assert not learnt.advantages.any()
    assert isinstance(learnt, Learnt)
    assert not learnt.returns.any()
    _, grads = ppo.losses_and_grads(params, equal, learnt, config, settings)
    assert all(not grad.any() for grad in grads.values())
