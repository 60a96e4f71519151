"""Each operation: extreme inputs, NaN, its arguments, and published rotary scaling."""

import numpy as np
import pytest

from reference_np import ops

from ..support.oracle_inputs import draw_array, heads_of

pytestmark = pytest.mark.numeric


def test_rope_scaling_is_what_was_published() -> None:
    """Llama 3.1: waves shorter than 2048 stay, longer than 8192 are eight times as long."""
    config = heads_of(128, rope_theta=5e5, rope_type="llama3", rope_factor=8.0)
    plain, scaled = (
        ops.rope_frequencies(heads_of(128, rope_theta=5e5)),
        ops.rope_frequencies(config),
    )
    waves = 2 * np.pi / plain
    assert np.array_equal(scaled[waves < 2048], plain[waves < 2048])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 8, rtol=1e-15)
    between = (waves > 2048) & (waves < 8192)
    assert between.sum() == 6
    share = (8192 / waves[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (share + (1 - share) / 8))
    linear = ops.rope_frequencies(heads_of(128, rope_type="linear", rope_factor=4.0))
    np.testing.assert_allclose(linear * 4, ops.rope_frequencies(heads_of(128)), rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_overflows_and_nothing_drifts(dtype: type) -> None:
    """Extreme inputs, with NumPy's warnings as errors."""
    huge = np.array([[-1e30, -1e4, -100, 0, 100, 1e4, 1e30]], dtype=dtype)
    assert np.array_equal(ops.silu(huge)[0, [0, 3, 6]], np.array([0, 0, 1e30], dtype))
    scores = np.array([1e5, -1e5, 0, 1e5], dtype).reshape(1, 1, 1, 1, 4)
    weights = ops.masked_softmax(scores, np.ones((1, 1, 4), bool))
    assert weights.dtype == dtype
    assert weights.ravel().tolist() == [0.5, 0, 0, 0.5]
    nothing = ops.masked_softmax(scores, np.zeros((1, 1, 4), bool))
    assert nothing.ravel().tolist() == [0, 0, 0, 0]


def test_arguments_are_left_alone() -> None:
    """What computes in place does so on its own arrays; to write to these would raise."""
    scores, x = draw_array(0, 1, 2, 2, 3, 4), draw_array(1, 2, 3)
    mask = np.tril(np.ones((1, 3, 4), bool))
    for array in (scores, x, mask):
        array.flags.writeable = False
    ops.masked_softmax(scores, mask)
    ops.swiglu(x, x)
    ops.rms_norm(x, x[0], 1e-5)


def test_nan_is_not_hidden() -> None:
    """A NaN that goes in comes out, except where the mask forbids looking."""
    scores = np.array([np.nan, 0.0]).reshape(1, 1, 1, 1, 2)
    assert np.isnan(ops.masked_softmax(scores, np.array([[[True, True]]]))).all()
    masked = ops.masked_softmax(scores, np.array([[[False, True]]]))
    assert masked.ravel().tolist() == [0.0, 1.0]
    assert np.isnan(ops.silu(np.array([np.nan]))).all()
