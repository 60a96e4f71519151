"""Every activation of the whole model, in the oracle and in torch."""

import numpy as np
import pytest
from hypothesis import given

from reference_np.config import LlamaConfig
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.tolerances import (
    FLOAT64_TOLERANCE,
    composed_bound,
    errors,
    kl_per_token,
    max_relative_error,
)

from ..backends.torch_model import torch_forward, torch_model
from ..conformance.strategies import Array, Case, cases, cast, random_params, wide_cases
from ..support.oracle_inputs import oracle_trace

pytestmark = pytest.mark.numeric


def torch_trace(case: Case, dtype: type) -> dict[str, Array]:
    model = torch_model(case.config, cast(case.params, dtype))
    _, _, trace = torch_forward(model, case.tokens, positions=case.positions, mask=case.mask)
    return trace


@given(case=cases())
def test_every_activation_in_float64(case: Case) -> None:
    exact, actual = oracle_trace(case, np.float64), torch_trace(case, np.float64)
    assert list(exact) == list(activation_axes(case.config))
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        assert actual[name].dtype == np.float64
        error = max_relative_error(actual[name], value)
        assert error <= FLOAT64_TOLERANCE, f"{name}: {error}"


@given(case=wide_cases())
def test_every_activation_in_float32(case: Case) -> None:
    """Against the float64 oracle on the same rounded weights, beside the plain float32 oracle."""
    rounded = case._replace(params=cast(cast(case.params, np.float32), np.float64))
    exact, plain = oracle_trace(rounded, np.float64), oracle_trace(rounded, np.float32)
    actual = torch_trace(rounded, np.float32)
    for name, value in exact.items():
        assert plain[name].dtype == actual[name].dtype == np.float32
        error = errors(actual[name], value)
        bound = composed_bound(errors(plain[name], value), "float32")
        assert error.within(bound), f"{name}: {error}, bound {bound}"


def test_kl_of_honest_float32_is_tiny() -> None:
    config = LlamaConfig(64, 4, 8, 2, 8, 172, 500)
    case = Case(config, random_params(config, 0), np.arange(40).reshape(2, 20), None, None)
    exact, actual = oracle_trace(case, np.float64), torch_trace(case, np.float32)
    kl = kl_per_token(actual["logits"], exact["logits"])
    # KL is quadratic in the logits' error, some 1e-6 here.
    assert 0 <= kl.max() < 1e-9


@given(case=cases())
def test_names_and_shapes_of_the_parameters(case: Case) -> None:
    state = torch_model(case.config, case.params).state_dict()
    assert {n: tuple(v.shape) for n, v in state.items()} == parameter_shapes(case.config)
