"""Training steps of the oracle: what they change, learn and refuse."""

import math

import numpy as np
import pytest
from hypothesis import given

from reference_np import optim
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.ops import IGNORE
from reference_np.optim import Hyperparameters

from ..conformance.strategies import cast, random_params
from ..conformance.training_cases import (
    TrainingCase,
    training_cases,
)

pytestmark = pytest.mark.numeric


@given(case=training_cases())
def test_a_step_changes_nothing_that_goes_in(case: TrainingCase) -> None:
    params = cast(case.params, np.float32)
    before = {name: value.copy() for name, value in params.items()}
    state = optim.init_state(params)
    new, _, metrics = optim.train_step(params, state, case.batches, case.config, case.hyper)
    assert all(np.array_equal(params[name], value) for name, value in before.items())
    assert not any(value.any() for value in state.exp_avg.values())
    assert {value.dtype for value in (*new.values(), *metrics.grads.values())} == {np.dtype("f4")}


def test_the_oracle_learns() -> None:
    """Thirty steps on one batch: the loss falls far below a uniform guess."""
    config = LlamaConfig(16, 2, 4, 2, 4, 40, 30)
    rng = np.random.default_rng(0)
    batch = Batch(*rng.integers(0, 30, (2, 4, 8)))
    params = random_params(config, 0)
    state = optim.init_state(params)
    hyper = Hyperparameters(lr=3e-2, steps=30, warmup_steps=3)
    losses = []
    for _ in range(30):
        params, state, metrics = optim.train_step(params, state, [batch], config, hyper)
        losses.append(metrics.loss)
    assert losses[-1] < 0.2 * losses[0]


def test_a_step_without_valid_targets_is_refused() -> None:
    config = LlamaConfig(4, 1, 2, 1, 2, 4, 5)
    tokens = np.zeros((1, 3), int)
    batch = Batch(tokens, np.full_like(tokens, IGNORE))
    with pytest.raises(InputError, match="valid target"):
        optim.accumulate(random_params(config, 0), [batch], config)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", (-1e-3, math.inf, math.nan)),
        ("beta1", (-0.1, 1.0)),
        ("beta2", (1.0, 1.5)),
        ("adam_eps", (0.0, -1e-8)),
        ("weight_decay", (-0.1,)),
        ("grad_clip", (0.0, -1.0, math.nan)),
        ("warmup_steps", (-1,)),
        ("steps", (-1,)),
        ("final_lr_ratio", (-0.1, 1.1)),
        ("z_loss", (-1e-4, math.nan)),
    ],
)
def test_a_hyperparameter_outside_its_domain_is_named(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"{name} is {value}, and must be "):
            Hyperparameters(**{name: value})


def test_no_clipping_and_a_constant_rate_are_inside() -> None:
    Hyperparameters(lr=0.0, grad_clip=math.inf, warmup_steps=0, steps=0, final_lr_ratio=1.0)
