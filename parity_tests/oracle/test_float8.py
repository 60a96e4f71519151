"""The oracle's fp8: its rounding is that of ml_dtypes, its scales the smallest that hold a tensor.

Beyond the largest value ml_dtypes gives NaN or an infinity; the oracle saturates.
"""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import float8
from reference_np.float8 import E4M3, E5M2, Format
from reference_np.ops import Array

pytestmark = pytest.mark.numeric

TYPES = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
both = pytest.mark.parametrize("form", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def values(form: Format) -> Array:
    """Return the finite values of a format in order, of both signs."""
    every = np.arange(256, dtype=np.uint8).view(TYPES[form]).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def cast(x: Array, form: Format) -> Array:
    """Return ml_dtypes' cast of x rounded to float32, as it rounds a float64 itself."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = np.asarray(x, np.float32).astype(TYPES[form]).astype(np.float64)
    return found


@both
def test_a_format_is_the_published_one(form: Format) -> None:
    every, info = values(form), ml_dtypes.finfo(TYPES[form])
    assert every.max() == form.largest == float(info.max)
    assert form.mantissa == info.nmant
    assert 2.0**form.smallest_exponent == float(info.smallest_normal)
    assert len(every) == {E4M3: 253, E5M2: 247}[form]


@both
def test_every_value_and_every_midpoint_is_rounded_as_ml_dtypes_does(form: Format) -> None:
    every = values(form)
    assert np.array_equal(float8.round_to(every, form), every)
    midpoints = (every[1:] + every[:-1]) / 2
    narrow = midpoints.astype(np.float32)
    assert np.array_equal(narrow, midpoints)
    above, below = (np.nextafter(narrow, np.float32(to)).astype(float) for to in (np.inf, -np.inf))
    for x in (midpoints, above, below):
        assert np.array_equal(float8.round_to(x, form), cast(x, form))
    ties = float8.round_to(midpoints, form)
    assert (ties == every[1:]).sum() == (ties == every[:-1]).sum()  # to even: up and down alike


@both
@given(
    mantissa=st.floats(1, 2, exclude_max=True, width=32),
    exponent=st.integers(-40, 15),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_drawn_numbers_are_rounded_as_ml_dtypes_does(
    form: Format, mantissa: float, exponent: int, sign: float
) -> None:
    x = np.array(sign * math.ldexp(mantissa, exponent))
    if abs(x) <= form.largest:
        assert float8.round_to(x, form) == cast(x, form)
    else:
        assert float8.round_to(x, form) == sign * form.largest


@both
def test_what_is_larger_saturates_and_nan_stays(form: Format) -> None:
    large = np.array([np.nextafter(form.largest, np.inf), 2 * form.largest, 1e300, np.inf])
    assert (float8.round_to(large, form) == form.largest).all()
    assert (float8.round_to(-large, form) == -form.largest).all()
    assert not np.isfinite(cast(large[1:], form)).any()
    with np.errstate(invalid="ignore"):
        assert np.isnan(float8.round_to(np.array([np.nan, 1.0]), form)).tolist() == [True, False]


@both
@pytest.mark.parametrize("power", [-90, -30, -1, 0, 7, 90])
def test_a_scale_changes_just_above_the_largest_value(form: Format, power: int) -> None:
    edge = math.ldexp(form.largest, power)
    below, above = math.nextafter(edge, 0), math.nextafter(edge, math.inf)
    for largest, scale in ((below, power), (edge, power), (above, power + 1)):
        x = np.array([largest, -largest / 3, 0.0])
        found, found_scale = float8.quantize(x, form)
        assert found_scale == 2.0**scale
        assert np.array_equal(found, cast(x / 2.0**scale, form))


@both
@given(
    exponent=st.integers(-90, 90),
    numbers=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9),
)
def test_a_scale_is_the_smallest_power_of_two_that_holds_the_tensor(
    form: Format, exponent: int, numbers: list[float]
) -> None:
    x = np.ldexp(np.array(numbers), exponent)
    found, scale = float8.quantize(x, form)
    assert math.frexp(scale)[0] == 0.5
    assert abs(x).max() <= form.largest * scale
    if abs(x).max() >= 2.0**-100:
        assert abs(x).max() > form.largest * scale / 2
    assert np.array_equal(found, cast(x / scale, form))
    assert abs(found).max() <= form.largest


@both
def test_what_is_below_two_to_minus_hundred_has_its_scale(form: Format) -> None:
    _, least = float8.quantize(np.array([2.0**-100]), form)
    assert 0 < least < math.inf
    for tiny in (0.0, 2.0**-101, -(2.0**-300)):
        found, scale = float8.quantize(np.array([[tiny, 0.0]]), form)
        assert scale == least
        assert np.array_equal(found, cast(np.array([[tiny / least, 0.0]]), form))


def test_gradients_are_those_of_the_rounded_factors() -> None:
    """Of exact factors, by hand; of others, those of what they are rounded to."""
    x = np.array([[[1.0, 2.0], [0.5, -3.0]]])  # [1, 2, 2]
    weights = [np.array([[1.0, 0.25]]), np.array([[2.0, -1.0], [0.0, 448.0]])]
    d_out = np.array([[[1.0, -2.0, 0.5], [4.0, 0.0, -1.0]]])
    whole = np.concatenate(weights)
    assert np.array_equal(float8.product(x, weights), x @ whole.T)
    d_x, d_weights = float8.product_vjp(x, weights, d_out)
    assert np.array_equal(d_x, d_out @ whole)
    assert [d.shape for d in d_weights] == [(1, 2), (2, 2)]
    assert np.array_equal(np.concatenate(d_weights), d_out[0].T @ x[0])
    finer = x + 2.0**-8, [w + 2.0**-9 for w in weights], d_out * (1 + 2.0**-6)
    for found, exact in zip(
        float8.product_vjp(*finer)[1], float8.product_vjp(x, weights, d_out)[1], strict=True
    ):
        assert np.array_equal(found, exact)


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_with_a_value_that_is_not_finite_has_no_scale(form: Format, value: float) -> None:
    found, scale = float8.quantize(np.array([[1.0, value]]), form)
    assert np.isnan(found).all()
    assert math.isnan(scale)
