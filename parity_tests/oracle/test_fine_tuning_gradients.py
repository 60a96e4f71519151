"""Each hand-derived gradient of fine-tuning, against differences of its operation."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given

from reference_np import reward
from reference_np.ops import IGNORE, Array

from ..conformance.architectures import seeds
from ..support.fine_tuning import DIFFERENCES, STEP, gradient_error, step_direction
from ..support.fine_tuning_cases import (
    CASES,
    MODULES,
    REFERENCE,
    Answers,
    Batch,
    answers,
    answers_of,
    as_tuple,
)

pytestmark = pytest.mark.numeric

COUNT = 6
# What a gradient is with respect to, by the first word of its operation.
INPUTS = {
    "token_loss_vjp": "logits",
    "score_at_vjp": "values",
    "log_probs_vjp": "logits",
    "exact_kl_vjp": "logits",
    "entropy_vjp": "logits",
    "k1_vjp": "log_p",
    "k2_vjp": "log_p",
    "k3_vjp": "log_p",
    "policy_loss_vjp": "log_p",
    "value_loss_vjp": "values",
}
PAIRS = ("pair_loss_vjp", "safety_loss_vjp")  # of no tokens; tested at the end
GRADIENTS = [name for name in CASES if "_vjp" in name]


def test_every_gradient_is_tested() -> None:
    defined = {n for module in MODULES for n in vars(module) if n.endswith("_vjp")}
    assert defined == {*INPUTS, *PAIRS}
    assert {name.split()[0] for name in GRADIENTS} == set(INPUTS)


def upstream(name: str, batch: Batch) -> Array | float:
    """Return the gradient that the case hands to its operation."""
    if name == "score_at_vjp":
        return batch.scores
    return 1.0 if "loss" in name else batch.d_out


def slope(name: str, batch: Batch) -> tuple[Callable[[Array], float], Array]:
    """Return the operation as a function of its input to one number, and that input."""
    key = INPUTS[name.split()[0]]
    forward, d_out = CASES[name.replace("_vjp", "")], upstream(name, batch)

    def f(x: Array) -> float:
        moved = batch._replace(arrays={**batch.arrays, key: x})
        return float(np.sum(d_out * as_tuple(forward(REFERENCE, moved, COUNT))[0]))

    return f, batch.arrays[key]


def gradient(name: str, batch: Batch, x: Array) -> Array:
    moved = batch._replace(arrays={**batch.arrays, INPUTS[name.split()[0]]: x})
    return as_tuple(CASES[name](REFERENCE, moved, COUNT))[0]


def is_smooth(name: str, batch: Batch, x: Array) -> bool:
    """Return whether no clip begins or ends within the differences' steps."""
    far = 2 * STEP * step_direction(x)
    zeros = [gradient(name, batch, at) == 0 for at in (x - far, x, x + far)]
    return all(np.array_equal(zeros[0], other) for other in zeros)


@pytest.mark.parametrize("name", GRADIENTS)
@given(given=answers())
def test_a_gradient_against_differences(name: str, given: Answers) -> None:
    batch = given.batch(0.5)
    f, x = slope(name, batch)
    assume(is_smooth(name, batch, x))
    assert gradient_error(f, x, gradient(name, batch, x)) <= DIFFERENCES


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_that_is_slightly_off_would_be_seen(name: str) -> None:
    batches = (answers_of([4, 5, 3], "left", seed).batch(0.5) for seed in range(9))
    batch = next(one for one in batches if is_smooth(name, one, slope(name, one)[1]))
    f, x = slope(name, batch)
    found = gradient(name, batch, x)
    assert gradient_error(f, x, found) <= DIFFERENCES
    assert gradient_error(f, x, found * (1 + 1e-6)) >= 10 * DIFFERENCES


@given(seed=seeds)
def test_the_gradients_of_the_reward_models_losses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen, rejected, margins = 3 * rng.standard_normal((3, 4))
    d_chosen, d_rejected = reward.pair_loss_vjp(chosen, rejected, margins, 5)
    of_chosen = gradient_error(
        lambda x: reward.pair_loss(x, rejected, margins, 5), chosen, d_chosen
    )
    of_rejected = gradient_error(
        lambda x: reward.pair_loss(chosen, x, margins, 5), rejected, d_rejected
    )
    labels = rng.choice([0, 1, IGNORE], 4)
    of_safety = gradient_error(
        lambda x: reward.safety_loss(x, labels, 3),
        chosen,
        reward.safety_loss_vjp(chosen, labels, 3),
    )
    assert max(of_chosen, of_rejected, of_safety) <= DIFFERENCES


def test_a_pairs_gradient_that_is_slightly_off_would_be_seen() -> None:
    zeros, gap = np.zeros(1), np.array([0.3])
    d_chosen, _ = reward.pair_loss_vjp(gap, zeros, zeros, 1)
    off = d_chosen * (1 + 1e-6)
    assert gradient_error(lambda x: reward.pair_loss(x, zeros, zeros, 1), gap, off) >= (
        10 * DIFFERENCES
    )
