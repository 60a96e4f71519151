"""Sums in any order are within their bounds; a sum in a lower precision is not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_parity.comparison.sum_bounds import norm_bound, norm_sum_error
from reference_np import ops
from reference_np.config import LlamaConfig
from reference_np.tolerances import UNIT_ROUNDOFF, errors_and_bounds, sequential_sum_error

from ..conformance.architectures import seeds
from ..conformance.strategies import Array
from ..false_alarms import trained
from ..planted import honest_kernels
from ..planted.bugs import norm_low_precision
from ..planted.operations import OPERATIONS
from ..planted.port import Planted

EPS = 1e-5


def stream_and_weight(seed: int, width: int, outlier: float) -> tuple[Array, Array]:
    """Draw a residual stream [1, 4, D], three channels ``outlier`` times larger, and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 4, width)).astype(np.float32)
    x[..., rng.choice(width, 3, replace=False)] *= np.float32(outlier)
    return x, np.exp(rng.standard_normal(width) / 2).astype(np.float32)


def exact_and_bound(x: Array, weight: Array) -> tuple[Array, Array]:
    """Return RMSNorm in float64 and the bound of its elements in float32."""
    exact = ops.rms_norm(x.astype(np.float64), weight.astype(np.float64), EPS)
    return exact, norm_bound(exact, norm_sum_error(x, EPS, "float32"), "float32")


def in_other_orders(squares: Array) -> dict[str, Array]:
    """Return float32 sums over D [B, T, 1] in the orders of plain and of vectorised loops."""
    lanes = squares[..., : squares.shape[-1] // 8 * 8].reshape(*squares.shape[:2], -1, 8)
    rest = squares[..., squares.shape[-1] // 8 * 8 :]
    in_lanes = np.concatenate([np.cumsum(lanes, axis=2)[:, :, -1], rest], axis=-1)
    terms = {
        "forwards": squares,
        "backwards": squares[..., ::-1],
        "eight lanes": in_lanes,
    }
    return {name: np.cumsum(x, axis=-1)[..., -1:] for name, x in terms.items()}


@pytest.mark.parametrize("width", [64, 4096, 11008])
@given(seed=seeds, outlier=st.sampled_from([1.0, 10.0, 100.0, 1000.0, 4000.0]))
def test_every_order_of_a_norms_sum_is_within_its_bound(
    width: int, seed: int, outlier: float
) -> None:
    x, weight = stream_and_weight(seed, width, outlier)
    exact, allowed = exact_and_bound(x, weight)
    for name, total in in_other_orders(x * x).items():
        y = weight * (x / np.sqrt(total / np.float32(width) + np.float32(EPS)))
        error, bound = errors_and_bounds(y, exact, allowed)
        assert error.within(bound), f"{name}: {error.share(bound):.3g} of the bound"


@pytest.mark.parametrize("outlier", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("width", [64, 4096, 11008])
def test_a_norm_in_a_lower_precision_is_ten_times_beyond_its_bound(
    width: int, outlier: float
) -> None:
    for seed in range(10):
        x, weight = stream_and_weight(seed, width, outlier)
        exact, allowed = exact_and_bound(x, weight)
        wrong = norm_low_precision(torch.from_numpy(x), torch.from_numpy(weight), EPS).numpy()
        error, bound = errors_and_bounds(wrong, exact, allowed)
        assert error.share(bound) > 10


@pytest.mark.parametrize("width", [64, 4096, 11008])
def test_channels_of_like_size_hardly_widen_a_norms_bound(width: int) -> None:
    """What every sum of so many terms is allowed is 2.5 standard deviations of the loop's error."""
    x, _ = stream_and_weight(0, width, 1.0)
    error = norm_sum_error(x, EPS, "float32")
    assert (error < 1.5 * sequential_sum_error(width, "float32")).all()


def test_a_loop_that_overflows_excuses_nothing() -> None:
    x = np.array([[[1e30, 1e-30], [0.0, 0.0]]])
    least = sequential_sum_error(2, "float32")
    assert (norm_sum_error(x, 0.0, "float32") == least).all()
    assert 0 < least < UNIT_ROUNDOFF["float32"]


@pytest.mark.parametrize("name", [*honest_kernels.KERNELS, "loops"])
def test_every_operation_that_an_honest_port_replaces_is_called(name: str) -> None:
    """One that the model never calls would leave the kernel untested."""
    replaced = vars(getattr(honest_kernels, name).ops)
    assert replaced.keys() == OPERATIONS.keys(), "an operation that the model does not have"
    called = set()

    def noting(key: str):  # type: ignore[no-untyped-def]
        def operation(*arguments):  # type: ignore[no-untyped-def]
            called.add(key)
            return replaced[key](*arguments)

        return operation

    port = Planted()
    vars(port.ops).update({key: noting(key) for key in replaced})
    config = LlamaConfig(32, 1, 2, 1, 16, 48, 50, max_seq_len=16)
    params = trained(config, np.random.default_rng(0))
    tokens = np.arange(8).reshape(1, 8)
    found, _ = port.traced_decode(config, params, tokens, None, None)
    assert np.isfinite(found["logits"]).all()
    assert called >= {key for key in replaced if replaced[key] is not OPERATIONS[key]}


def test_the_loops_norm_adds_its_terms_one_after_the_other() -> None:
    """2^24 and twelve ones: each one is lost, where a pairwise sum keeps them."""
    x = torch.ones(1, 1, 13)
    x[..., 0] = 2.0**12
    y = honest_kernels.loops.ops.rms_norm(x, torch.ones(13), 0.0)
    assert y[0, 0, 0] == x[0, 0, 0] * torch.rsqrt(torch.tensor(2.0**24 / 13))
