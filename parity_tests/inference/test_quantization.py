"""int8 weights: their distance from the given ones, and their names and products."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.inference.perplexity import evaluate
from llama_torch.inference.quantization import dequantize, quantize
from llama_torch.model.config import ModelConfig
from llama_torch.model.int8_linear import Int8Linear
from llama_torch.model.llama import Llama
from llama_torch.tokenizer.tokenizer import Gpt2

from ..backends.torch_model import torch_model
from ..conformance.strategies import Case, cast, wide_cases

pytestmark = pytest.mark.numeric


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


def test_half_precision_does_not_overflow() -> None:
    """Sums of int8 before the scale would reach a million here; the scaled ones, a thousand."""
    linear = Int8Linear(torch.full((2, 4096), 0.01))
    assert linear(torch.full((1, 4096), 30.0, dtype=torch.float16)).isfinite().all()


def test_an_untied_head_is_evaluated_in_int8() -> None:
    config = ModelConfig(16, 1, 2, 1, vocab_size=50257, max_seq_len=12, tie_embeddings=False)
    model = Llama(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    before = evaluate(model, Gpt2(), ["To be, or not to be"]).nats
    assert evaluate(quantize(model), Gpt2(), ["To be, or not to be"]).nats == pytest.approx(
        before, rel=1e-3
    )


@given(case=wide_cases())
def test_a_quantised_model_has_the_checkpoints_names(case: Case) -> None:
    """Norms, the embedding and a head tied to it are as they were; no other matrix is left."""
    model = torch_model(case.config, cast(case.params, np.float64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = dequantize(quantize(model))
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "norm" in name or "embed" in name}
