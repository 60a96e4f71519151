"""Verification of embedding gradients, which are sums over tokens, by a bound from their terms."""

import math

import pytest
import torch

from llama_torch.model import embedding
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training import verify, verify_sums
from llama_torch.training.batch import to_batch
from reference_np.tolerances import LAMBDA

from ..planted.training import NarrowSum

pytestmark = pytest.mark.numeric

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_fails_at_the_257th_occurrence_is_seen(
    dtype: torch.dtype, is_tied: bool, monkeypatch: Patch
) -> None:
    """Half of the micro-batch is one token, whose gradients torch sums in bfloat16 on a CPU."""
    config = ModelConfig(16, 1, 2, 1, vocab_size=50, max_seq_len=128, tie_embeddings=is_tied)
    made = Llama(config)
    made.init_weights(torch.Generator().manual_seed(0))
    made.to(dtype)
    window = torch.randint(50, (8, 129), generator=torch.Generator().manual_seed(1))
    window[:, ::2] = 7
    batches = [to_batch(window)]
    right = verify.check(made, batches, 0.0)
    monkeypatch.setattr(embedding, "embed", lambda ids, weight: NarrowSum.apply(weight, ids))
    wrong = verify.check(made, batches, 0.0)
    assert [m.parameter for m in (right[-1], wrong[-1])] == ["model.embed_tokens.weight"] * 2
    assert all(m.holds for m in right)
    assert wrong[-1].share > 3 > 2 * right[-1].share
    # What few tokens show of it is a rounding of bfloat16, which a model in it may make.
    assert all(m.holds for m in wrong[:-1]) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_terms_that_overflowed_excuse_no_finite_sum(bad: float) -> None:
    tokens, d_out = torch.tensor([0, 1, 0]), torch.ones(3, 4)
    d_out[1, 2] = bad
    found = torch.full((2, 4), 2.0)
    error, bound = verify_sums._worst(verify_sums.Terms(tokens, d_out, None, found), LAMBDA)
    assert error == math.inf > bound


def test_tokens_that_occur_once_have_no_error() -> None:
    made = Llama(ModelConfig(16, 1, 2, 1, vocab_size=50, max_seq_len=8, tie_embeddings=False))
    made.init_weights(torch.Generator().manual_seed(0))
    *_, found = verify.check(made, [to_batch(torch.arange(1, 10)[None])], 0.0)
    assert (found.parameter, found.error, found.share) == ("model.embed_tokens.weight", 0.0, 0.0)
