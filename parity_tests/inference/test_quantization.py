"""int8 and int4 weights: their distance from the given ones, their layout, names and products."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.inference.config import Quantize
from llama_torch.inference.perplexity import evaluate
from llama_torch.inference.quantization import LAYERS, dequantize, quantize
from llama_torch.model import int4_linear
from llama_torch.model.config import ModelConfig
from llama_torch.model.int4_linear import Int4Linear
from llama_torch.model.int8_linear import Int8Linear
from llama_torch.model.llama import Llama
from llama_torch.tokenizer.tokenizer import Gpt2

from ..backends.torch_model import torch_model
from ..conformance.strategies import Case, cast, wide_cases

pytestmark = pytest.mark.numeric

KINDS = tuple(LAYERS)


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 999),
)
def test_every_weight_is_within_half_a_step(
    rows: int, width: int, exponent: int, seed: int
) -> None:
    """A step is a 127th of the row's largest, which is itself exact; a row of zeros stays zero."""
    rng = np.random.default_rng(seed)
    matrix = torch.from_numpy(rng.standard_normal((rows, width)) * 2.0**exponent)
    matrix[0] = 0
    linear = Int8Linear(matrix)
    represented = linear.weight.double() * linear.scale.double()[:, None]
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert (represented[0] == 0).all()
    assert ((represented - matrix).abs() <= step * (0.5 + 1e-4)).all()
    assert linear.weight.abs().amax(1)[1:].eq(127).all()


def int4_matrix(rows: int, width: int, exponent: int, seed: int) -> torch.Tensor:
    """Draw a matrix [rows, width] in float64: Gaussian, with outliers, zeros and equal groups."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, width)) * 2.0**exponent
    matrix[rng.random((rows, width)) < 0.1] *= 30
    matrix[rng.random((rows, width)) < 0.2] = 0
    matrix[0, : width // 2] = 0
    if rows > 1:
        matrix[1] = 2.0**exponent
    return torch.from_numpy(matrix)


def columns_first(linear: Int4Linear) -> tuple[np.ndarray, np.ndarray]:
    """Return an int4 layer's numbers and scales, [out, in] each, read column by column."""
    packed, scale = linear.weight.numpy(), linear.scale.double().numpy()
    numbers = np.empty((len(packed), linear.in_features))
    scales = np.empty_like(numbers)
    for i in range(linear.in_features):
        block, column = divmod(i, 128)
        byte = packed[:, 64 * block + column % 64]
        numbers[:, i] = (byte >> 4 if column >= 64 else byte & 15).astype(float) - 8
        scales[:, i] = scale[:, i // 64]
    return numbers, scales


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    exponent=st.integers(-140, 110),
    seed=st.integers(0, 999),
)
def test_every_int4_weight_is_within_half_a_scale(
    rows: int, width: int, exponent: int, seed: int
) -> None:
    """Zeros stay zeros; a scale is at most a sixteenth larger than its group needs."""
    matrix = int4_matrix(rows, width, exponent, seed).numpy()
    linear = Int4Linear(torch.from_numpy(matrix))
    numbers, scales = columns_first(linear)
    represented = numbers * scales
    assert (np.abs(represented - matrix) <= scales / 2).all()
    assert (represented[matrix == 0] == 0).all()
    for start in range(0, width, 64):
        top = np.abs(matrix[:, start : start + 64]).max(1)
        needed = np.where(top > 0, np.maximum(top / 7.5, 2.0**-118), 0)
        assert (scales[:, start] <= needed * (1 + 1 / 16)).all()


@given(width=st.integers(1, 300), exponent=st.integers(-140, 110), seed=st.integers(0, 999))
def test_no_precision_rounds_an_int4_weight_again(width: int, exponent: int, seed: int) -> None:
    """What the layer multiplies by is the product of number and scale, which bfloat16 holds."""
    linear = Int4Linear(int4_matrix(3, width, exponent, seed))
    numbers, scales = columns_first(linear)
    exact = numbers * scales
    assert (exact.astype(ml_dtypes.bfloat16).astype(np.float64) == exact).all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert (linear.dequantize(dtype).double().numpy() == exact).all()


def test_int4_rows_are_quantized_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = int4_matrix(7, 200, 0, 0)
    whole = Int4Linear(matrix)
    monkeypatch.setattr(int4_linear, "CHUNK", 450)
    parts = Int4Linear(matrix)
    assert torch.equal(parts.weight, whole.weight)
    assert torch.equal(parts.scale, whole.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_not_finite_is_not_hidden(kind: Quantize, bad: float) -> None:
    """The logits are not finite then, and generation says so."""
    matrix = torch.ones(2, 150)
    matrix[1, 140] = bad
    assert LAYERS[kind](matrix)(torch.ones(1, 150))[0].isfinite().tolist() == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_does_not_overflow(kind: Quantize) -> None:
    """Sums of integers before the scale would reach a million here; the scaled ones, a thousand."""
    linear = LAYERS[kind](torch.full((2, 4096), 0.01))
    assert linear(torch.full((1, 4096), 30.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize(("kind", "near"), [("int8", 1e-3), ("int4", 2e-2)])
def test_an_untied_head_is_evaluated_quantized(kind: Quantize, near: float) -> None:
    config = ModelConfig(16, 1, 2, 1, vocab_size=50257, max_seq_len=12, tie_embeddings=False)
    model = Llama(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    before = evaluate(model, Gpt2(), ["To be, or not to be"]).nats
    after = evaluate(quantize(model, kind), Gpt2(), ["To be, or not to be"]).nats
    assert after == pytest.approx(before, rel=near)
    assert after != before


@pytest.mark.parametrize("kind", KINDS)
@given(case=wide_cases())
def test_a_quantised_model_has_the_checkpoints_names(kind: Quantize, case: Case) -> None:
    """Norms, the embedding and a head tied to it are as they were; no other matrix is left."""
    model = torch_model(case.config, cast(case.params, np.float64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = dequantize(quantize(model, kind))
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "norm" in name or "embed" in name}
