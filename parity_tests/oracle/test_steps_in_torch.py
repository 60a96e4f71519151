"""The torch trainer and its schedule against whole steps of the oracle."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.training.optimizer import learning_rate
from reference_np import grad, optim, training_mutants
from reference_np.grad import Batch
from reference_np.mutants import Mutant
from reference_np.optim import Hyperparameters
from reference_np.tolerances import BASELINE_FACTOR, FLOOR_ROUNDINGS, UNIT_ROUNDOFF

from ..backends.torch_backends import optim_config
from ..conformance.architectures import seeds
from ..conformance.strategies import Params, cast, wide_cases
from ..conformance.training_cases import (
    STEPS_TOLERANCE,
    TrainingCase,
    fixed_training_cases,
)
from ..support.torch_training import Trained, distances, oracle_train, torch_train

pytestmark = pytest.mark.numeric


@given(case=wide_cases(), z_loss=st.sampled_from([0.0, 1e-2]), seed=seeds)
def test_whole_steps_in_float32(case: Any, z_loss: float, seed: int) -> None:
    """Three steps in float32: at most BASELINE_FACTOR times the plain oracle's error, plus a floor.

    Measured on each parameter's change and on the moments, as rms over the whole model:
    rounding in the gradients reaches the parameters through Adam's division, which can turn
    one element's sign, so that single elements have no useful bound. How far steps carry a
    rounding is a matter of luck (of ten, by orders of magnitude), so the oracle's error is the
    worst of four: its own, and those from parameters moved by one rounding.
    """
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, case.config.vocab_size, case.tokens.shape)
    params = cast(cast(case.params, np.float32), np.float64)
    hyper = Hyperparameters(lr=1e-3, z_loss=z_loss, warmup_steps=3, steps=12)
    batches = [Batch(case.tokens, targets, case.positions)]
    training = TrainingCase(case.config, params, batches, hyper)
    exact = oracle_train(training, 3, np.float64)
    unit = UNIT_ROUNDOFF["float32"]
    moved_once = (
        {n: v * (1 + unit * rng.choice([-2.0, 2.0], v.shape)) for n, v in params.items()}
        for _ in range(3)
    )
    plain = [
        oracle_train(training._replace(params=start), 3, np.float32)
        for start in (params, *moved_once)
    ]
    actual = torch_train(training, 3, np.float32)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        start = params if kind == "params" else dict.fromkeys(params, 0.0)
        moved = {n: v - start[n] for n, v in getattr(exact, kind).items()}

        def error(found: Trained, kind: str = kind, moved: Params = moved) -> float:
            squares = (
                np.sum((v - getattr(exact, kind)[n]) ** 2) for n, v in getattr(found, kind).items()
            )
            return float(np.sqrt(sum(squares) / sum(np.sum(v**2) for v in moved.values())))

        floor = FLOOR_ROUNDINGS * unit
        assert error(actual) <= BASELINE_FACTOR * max(map(error, plain)) + floor, kind
    for step, (mine, theirs) in enumerate(zip(actual.losses, exact.losses, strict=True)):
        # log Z - l is a difference of numbers near ten, or of the loss's own size, each known to
        # some roundings.
        allowed = max(abs(one.losses[step] - theirs) for one in plain)
        assert abs(mine - theirs) <= BASELINE_FACTOR * allowed + (10 + theirs) * floor


@lru_cache(maxsize=1)
def trained_by_torch() -> tuple[tuple[TrainingCase, Trained], ...]:
    return tuple((case, torch_train(case, 3, np.float64)) for case in fixed_training_cases())


def margin(**bug: Any) -> tuple[float, str]:
    """Return the largest error / tolerance over fixed_training_cases, and its kind."""
    return max(
        (error / STEPS_TOLERANCE, kind)
        for case, theirs in trained_by_torch()
        for kind, error in distances(theirs, oracle_train(case, 3, np.float64, **bug)).items()
    )


def test_the_reference_survives_where_mutants_are_killed() -> None:
    assert margin()[0] <= 0.1


@pytest.mark.parametrize("mutant", training_mutants.TRAINING, ids=lambda mutant: mutant.name)
def test_training_mutants_are_killed(mutant: Mutant) -> None:
    """By ten times the tolerance at least; the honest trainer stays under a tenth of it."""
    times, kind = margin(
        vjps=mutant.apply(grad.REFERENCE_VJPS), rules=mutant.apply(optim.REFERENCE_RULES)
    )
    assert times >= 10, f"{mutant.name}: {times:.1e} times the tolerance, in {kind}"


@given(steps=st.integers(1, 40), warmup=st.integers(0, 50), ratio=st.sampled_from([0.0, 0.1, 1.0]))
def test_schedules_agree(steps: int, warmup: int, ratio: float) -> None:
    hyper = Hyperparameters(steps=steps, warmup_steps=warmup, final_lr_ratio=ratio)
    for step in range(steps + 2):
        theirs = learning_rate(step, steps, optim_config(hyper))
        assert theirs == pytest.approx(optim.learning_rate(step, hyper), rel=1e-14)
