"""Initial weights against the distribution they are drawn from."""

import itertools
import math
from typing import Any

import pytest
import torch

from llama_torch.model.config import ModelConfig
from llama_torch.model.embedding import Embedding
from llama_torch.model.llama import Llama
from reference_np.tolerances import LAMBDA

DIM, LAYERS = 128, 3


def drawn(is_tied: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    model = Llama(
        ModelConfig(
            dim=DIM,
            n_layers=LAYERS,
            n_heads=4,
            n_kv_heads=2,
            hidden_dim=192,
            vocab_size=300,
            max_seq_len=8,
            tie_embeddings=is_tied,
        )
    )
    model.init_weights(torch.Generator().manual_seed(seed))
    return {name: p.detach().double() for name, p in model.named_parameters()}


def deviation(name: str) -> float:
    """Return the standard deviation of a matrix's distribution."""
    writes_to_stream = "o_proj" in name or "down_proj" in name
    return 0.02 / math.sqrt(2 * LAYERS) if writes_to_stream else 0.02


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_every_matrix_is_drawn_from_its_normal_distribution(is_tied: bool) -> None:
    """The k-th moment of n draws errs by sqrt(var / n), of which LAMBDA are allowed."""
    weights = drawn(is_tied)
    assert len(weights) == 2 + 9 * LAYERS + (not is_tied)
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        x, error = weight.flatten() / deviation(name), LAMBDA / math.sqrt(weight.numel())
        # The variances of x, x^2 and x^4 under N(0, 1).
        assert abs(x.mean()) <= error, name
        assert abs(x.square().mean() - 1) <= math.sqrt(2) * error, name
        assert abs(x.pow(4).mean() - 3) <= math.sqrt(96) * error, name


def test_rows_columns_and_matrices_are_independent() -> None:
    """The correlation of n draws is about 1 / sqrt(n)."""
    scaled = {n: w / deviation(n) for n, w in drawn(is_tied=False).items() if w.ndim == 2}
    for name, weight in scaled.items():
        for rows in (weight, weight.T):
            products = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
            assert products.abs().max() <= LAMBDA / math.sqrt(rows.shape[1]), name
    for (name, one), (other_name, other) in itertools.combinations(scaled.items(), 2):
        n = min(one.numel(), other.numel())
        correlation = one.flatten()[:n] @ other.flatten()[:n] / n
        assert abs(correlation) <= LAMBDA / math.sqrt(n), (name, other_name)


def test_the_seed_alone_decides() -> None:
    one, again, other = drawn(False, 1), drawn(False, 1), drawn(False, 2)
    for name, weight in one.items():
        assert torch.equal(weight, again[name])
        assert (weight.ndim == 1) == torch.equal(weight, other[name]), name


def test_nothing_is_drawn_where_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing on the meta device would import torch's compiler, for seconds of every load."""

    def refuse(_: Any) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", refuse)
    with torch.device("meta"):
        assert Embedding(3, 2).weight.is_meta
    with pytest.raises(AssertionError, match="drawn"):
        Embedding(3, 2)
