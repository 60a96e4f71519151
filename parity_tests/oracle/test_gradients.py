"""The whole model's gradients, against central differences."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given

from reference_np.grad import loss_and_grads

from ..conformance.strategies import Array
from ..conformance.training_cases import TrainingCase, training_cases

pytestmark = pytest.mark.numeric

# Central differences with step h err by h^2 f''' / 6 + u |f| / h: at 1e-5 some 1e-10 and 1e-11
# relative to a well-scaled f, and 1e-6 of the gradient leaves room for its cancellation.
DIFFERENCE_STEP = 1e-5

DIFFERENCES = 1e-6


def central_difference(f: Callable[[Array], float], x: Array, direction: Array) -> float:
    h = DIFFERENCE_STEP
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


@given(case=training_cases())
def test_the_models_gradient_against_central_differences(case: TrainingCase) -> None:
    batch, rng = case.batches[0], np.random.default_rng(0)
    _, grads = loss_and_grads(case.params, batch, case.config, z_loss=0.1)
    assert grads.keys() == case.params.keys()
    name = sorted(grads)[rng.integers(len(grads))]
    direction = rng.standard_normal(grads[name].shape)

    def loss(value: Array) -> float:
        moved = case.params | {name: value}
        return loss_and_grads(moved, batch, case.config, z_loss=0.1)[0]

    numeric = central_difference(loss, case.params[name], direction)
    analytic = float(np.sum(grads[name] * direction))
    scale = float(np.sum(np.abs(grads[name] * direction))) + 1e-2
    assert abs(numeric - analytic) <= 10 * DIFFERENCES * scale, name
