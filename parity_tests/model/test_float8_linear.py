"""Products in fp8, and their gradients, are the oracle's; known faults in them are told apart."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_torch.model import float8_linear
from llama_torch.model.float8_linear import Float8Product
from reference_np import float8

from ..conformance.architectures import seeds
from ..support.devices import on_every_device
from ..support.float8_cases import FORMATS, Case, cases, computed, draw_case, share, tensor

pytestmark = pytest.mark.numeric

Patch = pytest.MonkeyPatch
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
both = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


@on_every_device
@given(operands=cases())
def test_products_and_gradients_are_the_oracles(device: str, operands: Any) -> None:
    case = Case(*operands)
    assert share(case, computed(case, device), device) <= 1


@on_every_device
@both
@given(
    seed=seeds,
    exponents=st.lists(st.integers(-125, 110), min_size=1, max_size=3),
    own=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_cast_is_the_oracles_to_the_bit(
    device: str, dtype: torch.dtype, seed: int, exponents: list[int], own: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    matrices = [tensor(rng, 16, 32, exponent).to(own) for exponent in exponents]
    given = [matrix.to(device) for matrix in matrices]
    values, transposed, scale = float8_linear.quantize(given, dtype)
    exact = torch.cat(matrices).double().numpy()
    wanted, wanted_scale = float8.quantize(exact, FORMATS[dtype])
    assert scale.item() == wanted_scale
    assert np.array_equal(values.cpu().float().numpy(), wanted)
    assert torch.equal(transposed.float(), values.float().T)
    assert transposed.is_contiguous()


@both
@pytest.mark.parametrize("power", [-100, -30, 0, 1, 60, 100])
def test_a_scale_changes_just_above_the_largest_value(dtype: torch.dtype, power: int) -> None:
    form = FORMATS[dtype]
    edge = np.float32(math.ldexp(form.largest, power))
    for towards in (0, edge, np.inf):
        x = np.full((16, 16), np.nextafter(edge, np.float32(towards)))
        _, _, scale = float8_linear.quantize([torch.from_numpy(x)], dtype)
        assert scale.item() == float8.quantize(x.astype(float), form)[1]


@both
@pytest.mark.parametrize("value", [0.0, 2.0**-101, 2.0**-149])
def test_zeros_and_what_is_all_but_zero_have_a_finite_scale(
    dtype: torch.dtype, value: float
) -> None:
    x = torch.full((16, 16), value)
    values, _, scale = float8_linear.quantize([x], dtype)
    wanted, wanted_scale = float8.quantize(x.double().numpy(), FORMATS[dtype])
    assert scale.item() == wanted_scale
    assert np.array_equal(values.float().numpy(), wanted)


# What a cast makes of more than the largest value is another thing on another torch: the largest
# value, NaN or an infinity.


class LargestCast(TorchDispatchMode):
    """The largest value that was cast to fp8, as a part of the type's largest."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        dtype = (kwargs or {}).get("dtype")
        if dtype in FORMATS:
            self.seen.append(args[0].abs().max().item() / FORMATS[dtype].largest)
        return function(*args, **(kwargs or {}))


@both
@given(
    values=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=6),
    factor=st.sampled_from([1.0, 0.5 + 2.0**-24, 448.0, 448.00003, 57344.0, 57344.004]),
)
def test_no_value_that_is_cast_is_beyond_the_largest(
    dtype: torch.dtype, values: list[float], factor: float
) -> None:
    matrices = [torch.tensor([[value, factor]]) for value in values]
    with LargestCast() as cast:
        float8_linear.quantize(matrices, dtype)
    assert len(cast.seen) == len(matrices)
    largest = max(map(abs, [*values, factor]))
    assert 0.5 < max(cast.seen) <= 1 or largest < 2.0**-100


@on_every_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", ["x", "W", "d_out"])
def test_what_is_not_finite_is_never_a_number(device: str, value: float, at: str) -> None:
    """Every number computed from the tensor, not from one of its rows alone, is NaN or infinite."""
    case = draw_case(0, torch.float32, [2, 1, 1, 2], [0, 0, 0])
    {"x": case.x, "W": case.weights[1], "d_out": case.d_out}[at][3, 5] = value
    out, d_x, *d_weights = computed(case, device)
    spoilt = {"x": (out, *d_weights), "W": (out, d_x), "d_out": (d_x, *d_weights)}[at]
    assert not any(found.isfinite().any() for found in spoilt)
    kept = [found for found in (out, d_x, *d_weights) if not any(found is s for s in spoilt)]
    assert all(found.isfinite().all() for found in kept)


@given(seed=seeds, power=st.integers(-20, 20))
def test_a_gradient_times_a_power_of_two_gives_gradients_times_it(seed: int, power: int) -> None:
    """To the bit: a scale adds no rounding."""
    case = draw_case(seed, torch.bfloat16, [1, 2, 1, 1], [0, 0, 0])
    more = computed(dataclasses.replace(case, d_out=torch.ldexp(case.d_out, torch.tensor(power))))
    for found, wanted in zip(more[1:], computed(case)[1:], strict=True):
        assert torch.equal(found, torch.ldexp(wanted, torch.tensor(power)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_cast_is_understood_by_torchs_compiler(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What it cannot read it takes for a kernel that writes all its inputs, and it copies them."""
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(float8_linear.quantize, fullgraph=True)
    found, wanted = compiled([x, x], E4M3), float8_linear.quantize([x, x], E4M3)
    for of_compiled, eager in zip(found, wanted, strict=True):
        assert torch.equal(of_compiled.float(), eager.float())
    assert "assuming every input is mutated" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at what torch warns of
def test_a_compiled_product_is_the_eager_one() -> None:
    case = draw_case(1, torch.bfloat16, [2, 1, 1, 2], [3, -2, 1])
    wanted = computed(case)
    compiled = torch.compile(Float8Product.apply, backend="aot_eager", fullgraph=True)
    x, *weights = (a.clone().requires_grad_() for a in (case.x, *case.weights))
    out = compiled(x, *weights)
    found = [out, *torch.autograd.grad(out, [x, *weights], case.d_out)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Faults


def other_scale(patch: Patch) -> None:
    """Cast the weights with the scale of the input."""
    real, last = float8_linear.multiplier_of, list[Tensor]()

    def multiplier_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
        last.append(real(largest, dtype))
        return last[-2] if len(last) % 3 == 2 else last[-1]

    patch.setattr(float8_linear, "multiplier_of", multiplier_of)


def on_amax(change: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Callable[[Patch], None]:
    """Return a fault of the largest value that determines the scale."""

    def fault(patch: Patch) -> None:
        real, of_values, given = float8_linear.quantize, float8_linear.multiplier_of, []

        def quantize(matrices: Sequence[Tensor], dtype: torch.dtype) -> Any:
            given[:] = matrices
            return real(matrices, dtype)

        patch.setattr(float8_linear, "quantize", quantize)
        patch.setattr(
            float8_linear,
            "multiplier_of",
            lambda largest, dtype: of_values(change(largest, given), dtype),
        )

    return fault


AMAX = {
    "of the first row": lambda _, matrices: matrices[0][0].abs().amax(),
    "of the first matrix": lambda _, matrices: matrices[0].abs().amax(),
    "of the last matrix": lambda _, matrices: matrices[-1].abs().amax(),
    "without the sign": lambda _, matrices: torch.cat([*matrices]).amax(),
    "of an earlier step, smaller": lambda largest, _: largest / 8,
    "of an earlier step, larger": lambda largest, _: largest * 8,
    "half of the range": lambda largest, _: largest * 2,
}


def e5m2_forward(patch: Patch) -> None:
    patch.setattr(float8_linear, "FORWARD", E5M2)


def e4m3_backward(patch: Patch) -> None:
    patch.setattr(float8_linear, "BACKWARD", E4M3)


def weight_scale_in_the_weight_gradient(patch: Patch) -> None:
    real, scales = float8_linear.multiply, list[Tensor]()

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *rest: Any) -> Tensor:
        scales.append(b_scale)
        if len(scales) % 3 == 0:
            b_scale = scales[-2]
        return real(a, a_scale, b, b_scale, *rest)

    patch.setattr(float8_linear, "multiply", multiply)


def scale_left_out(patch: Patch) -> None:
    real = float8_linear.multiply
    patch.setattr(
        float8_linear,
        "multiply",
        lambda a, a_scale, b, b_scale, dtype: real(a, a_scale, b, b_scale * 0 + 1, dtype),
    )


def on_values(rounded: Callable[[Any], Any], flushes: bool = False) -> Callable[[Patch], None]:
    """Return a fault of the cast, which rounds multiples of the spacing otherwise."""

    def fault(patch: Patch) -> None:
        def quantize(matrices: Sequence[Tensor], dtype: torch.dtype) -> Any:
            form, x = FORMATS[dtype], torch.cat([*matrices]).detach().double().numpy()
            scale = float8.quantize(x, form)[1]
            exponents = np.maximum(np.frexp(x / scale)[1] - 1, form.smallest_exponent)
            spacing = np.ldexp(1.0, exponents - form.mantissa)
            values = rounded(x / scale / spacing) * spacing
            if flushes:
                values = np.where(abs(values) < 2.0**form.smallest_exponent, 0, values)
            values8 = torch.from_numpy(values).float().to(dtype)
            return values8, values8.t().contiguous(), torch.tensor(scale).float()

        patch.setattr(float8_linear, "quantize", quantize)

    return fault


FAULTS: dict[str, Callable[[Patch], None]] = {
    "scale of the other tensor": other_scale,
    **{f"largest value {name}": on_amax(change) for name, change in AMAX.items()},
    "E5M2 forward": e5m2_forward,
    "E4M3 backward": e4m3_backward,
    "scale of the weights in their gradient": weight_scale_in_the_weight_gradient,
    "scale left out": scale_left_out,
    "truncated": on_values(np.trunc),
    "ties away from zero": on_values(lambda x: np.trunc(x + np.copysign(0.5, x))),
    "subnormal values flushed": on_values(np.round, flushes=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_exceeds_the_bound(name: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    """By ten times, in one of twelve cases that are right without it."""
    drawn = [draw_case(seed, dtype, [2, 3, 1, 2], [2, -3, -9]) for seed in range(12)]
    assert all(share(case, computed(case)) <= 1 for case in drawn)
    FAULTS[name](monkeypatch)
    assert max(share(case, computed(case)) for case in drawn) > 10


def test_the_faults_machinery_alone_changes_nothing(monkeypatch: Patch) -> None:
    case = draw_case(0, torch.float32, [2, 3, 1, 2], [2, -3, -9])
    wanted = computed(case)
    for harmless in (on_values(np.round), on_amax(lambda largest, _: largest)):
        with monkeypatch.context() as patch:
            harmless(patch)
            found = computed(case)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
