"""The error measures and bounds: NaN, infinity, other shapes and zeros included."""

import math

import numpy as np
import pytest

from reference_np.tolerances import Errors, composed_bound, errors, kl_per_token, max_relative_error

pytestmark = pytest.mark.numeric

EXACT = np.random.default_rng(0).standard_normal((2, 500, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_infinite_errors(bad: float) -> None:
    broken = EXACT.copy()
    broken[1, 3, 2] = bad
    for pair in ((broken, EXACT), (EXACT, broken), (broken, broken)):
        assert max_relative_error(*pair) == math.inf
        assert errors(*pair) == Errors(math.inf, math.inf, math.inf)
        for bound in (1e9, math.inf):
            assert not errors(*pair).within(Errors(bound, bound, bound))


def test_another_shape_is_an_infinite_error() -> None:
    assert max_relative_error(EXACT[:1], EXACT) == math.inf
    assert errors(EXACT[:, :1], EXACT).rms == math.inf


def test_one_wrong_token_in_a_thousand_is_seen() -> None:
    wrong = EXACT.copy()
    wrong[1, 77] = -wrong[1, 77]
    found = errors(wrong, EXACT)
    assert found.token == pytest.approx(2.0)
    assert found.rms < 0.1


def test_a_wrong_small_token_is_seen() -> None:
    exact = EXACT.copy()
    exact[0, 0] *= 1e-4
    wrong = exact.copy()
    wrong[0, 0] = 0
    found = errors(wrong, exact)
    assert found.token == pytest.approx(1.0)
    assert max(found.rms, found.worst) < 1e-3


def test_zero_rows_agree_with_zero_rows_only() -> None:
    exact = EXACT.copy()
    exact[0, 0] = 0
    assert errors(exact, exact) == Errors(0, 0, 0)
    wrong = exact.copy()
    wrong[0, 0] = 1e-3
    assert errors(wrong, exact).token > 1


def test_the_measurement_is_float64() -> None:
    """1 + 2^-30 differs from 1 although neither float32 nor a float32 norm can say so."""
    one = np.ones((1, 1, 4))
    assert errors(one + 2.0**-30, one).rms == pytest.approx(2.0**-30)


def test_composed_bound_and_share() -> None:
    bound = composed_bound(Errors(1e-7, 2e-7, 3e-7), "float32")
    assert bound.rms == pytest.approx(3e-7 + 8 * 2.0**-24)
    assert bound.worst == pytest.approx(6e-7 + 24 * 2.0**-24)
    assert bound.share(bound) == 1
    assert bound.within(bound)


def test_kl_sees_a_permuted_vocabulary() -> None:
    assert kl_per_token(EXACT, EXACT).max() == pytest.approx(0, abs=1e-15)
    assert kl_per_token(EXACT[..., ::-1], EXACT).min() > 0
    shifted = EXACT + 5.0  # softmax does not see a constant
    assert kl_per_token(shifted, EXACT).max() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 5, 3), (2, 5, 3, 4)])
def test_arrays_of_any_number_of_axes_are_measured(shape: tuple[int, ...]) -> None:
    found = errors(np.full(shape, 1.001), np.ones(shape))
    assert found == pytest.approx((1e-3, 1e-3, 1e-3))
