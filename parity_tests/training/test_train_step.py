"""The training step: chunked loss, micro-batches, learning rates, initial weights."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch.config import OptimConfig
from llama_torch.distributed.parallel import Parallel
from llama_torch.model import loss as model_loss
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.loss import IGNORE_INDEX, _chunks, backward_loss, count_valid, loss_sum
from llama_torch.training import batch, step, validate
from llama_torch.training.optimizer import learning_rate, make_adamw

from ..conformance.architectures import seeds

TINY = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=60)


def fresh_model(seed: int = 0) -> Llama:
    model = Llama(TINY)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.double()


def random_batch(rng: np.random.Generator, rows: int, length: int) -> batch.Batch:
    tokens = torch.from_numpy(rng.integers(0, TINY.vocab_size, (rows, length)))
    targets = torch.from_numpy(rng.integers(0, TINY.vocab_size, (rows, length)))
    targets[torch.from_numpy(rng.random((rows, length)) < 0.4)] = IGNORE_INDEX
    return batch.Batch(tokens, targets)


@given(seed=seeds, rows=st.integers(2, 5), length=st.integers(2, 9), data=st.data())
def test_a_step_does_not_depend_on_its_split(
    seed: int, rows: int, length: int, data: st.DataObject
) -> None:
    """Micro-batches with unequal counts of valid targets: a mean of means would differ."""
    rng = np.random.default_rng(seed)
    tokens, targets, *_ = random_batch(rng, rows, length)
    targets[0, 0] = 1  # at least one counts
    cut = data.draw(st.integers(1, rows - 1), label="cut")
    results = []
    for parts in ([slice(0, rows)], [slice(0, cut), slice(cut, rows)]):
        model = fresh_model()
        optimizer = make_adamw(model, OptimConfig())
        loss, norm = step.train_step(
            model,
            optimizer,
            [batch.Batch(tokens[part], targets[part]) for part in parts],
            lr=1e-2,
            grad_clip=0.5,
        )
        results.append((loss, norm, *(p.detach() for p in model.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class OneOf(Parallel):
    """One rank of several that split the windows; it records its terms of the total."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.data_rank, self.data_size, self.added = rank, world, torch.zeros(2).double()

    def all_reduce_sum_(self, values: torch.Tensor) -> torch.Tensor:
        self.added = values
        return torch.ones(2)


@given(seed=seeds, n_batches=st.integers(1, 7), world=st.integers(1, 5))
def test_processes_share_out_an_evaluation(seed: int, n_batches: int, world: int) -> None:
    """Each window once, also where some processes have one window less, or none."""
    rng, model = np.random.default_rng(seed), fresh_model()
    windows = [torch.from_numpy(rng.integers(0, 60, (2, 6))) for _ in range(n_batches)]
    shared = [OneOf(rank, world) for rank in range(world)]
    for one in shared:
        validate.validation_loss(model, windows, parallel=one)
    loss, n_valid = sum(one.added for one in shared).tolist()
    assert n_valid == 10 * n_batches
    assert loss / n_valid == pytest.approx(validate.validation_loss(model, windows), rel=1e-12)


@given(n=st.integers(1, 60), vocab_size=st.integers(1, 40), n_bytes=st.integers(1, 4000))
def test_pieces_are_alike_and_their_logits_fit(n: int, vocab_size: int, n_bytes: int) -> None:
    """All positions in order; only the last piece is smaller, and only one row may not fit."""
    hidden, targets = torch.zeros(1, n, 2), torch.arange(n)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_torch.model.loss.CHUNK_BYTES", n_bytes)
        pieces = [piece for _, piece in _chunks(hidden, vocab_size, targets)]
    assert torch.equal(torch.cat(pieces), targets[0])
    sizes = [len(piece) for piece in pieces]
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0] <= max(1, n_bytes // (4 * vocab_size))


@given(seed=seeds, rows=st.integers(1, 4), length=st.integers(1, 9), piece=st.integers(1, 7))
def test_the_chunked_loss_is_the_plain_one(seed: int, rows: int, length: int, piece: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, targets, *_ = random_batch(rng, rows, length)
    targets[0, 0] = 1
    model = fresh_model()
    logits, _ = model(tokens)
    n_valid = count_valid(targets)
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
    )
    plain.backward()
    expected = [p.grad for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_loss, "CHUNK_BYTES", 8 * piece * TINY.vocab_size)
        model = fresh_model()
        hidden, _ = model.model(tokens)
        loss = backward_loss(hidden, model.head_weight, targets, n_valid)
        total = loss_sum(hidden.detach(), model.head_weight.detach(), targets)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert total.item() == pytest.approx(plain.item() * n_valid, rel=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_step_without_valid_targets_is_refused() -> None:
    tokens = torch.zeros(1, 3, dtype=torch.long)
    model = fresh_model()
    with pytest.raises(InputError, match="valid target"):
        step.train_step(
            model,
            make_adamw(model, OptimConfig()),
            [batch.Batch(tokens, torch.full_like(tokens, IGNORE_INDEX))],
            lr=1.0,
            grad_clip=1.0,
        )


def test_only_matrices_decay() -> None:
    decayed, kept = make_adamw(fresh_model(), OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}


def test_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, 1, config) > 0  # a run of one step still moves


def test_initial_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (list(fresh_model(seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
