"""The order of windows: every one once, the same when resumed or shared, in its weights' shares."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch.data import order
from llama_torch.data.corpus import Corpus, Source
from llama_torch.data.loader import StepSampler, train_batches, val_batches

from ..conformance.architectures import seeds


def corpus_of(*n_train: int, n_val: int = 50, weights: tuple[float, ...] = (1.0,)) -> Corpus:
    """Sources of consecutive numbers, each from a million on above the one before."""
    sources = [
        Source(10**6 * i + np.arange(n), 10**6 * i + np.arange(n_val), f"numbers {i}")
        for i, n in enumerate(n_train)
    ]
    return Corpus(tuple(sources), weights, "key")


PINNED = [3983, 1583, 9183, 5583, 2110, 5606]
PINNED_SOURCES = [2, 0, 1, 0, 2, 0, 1, 0, 1, 0]
shapes = {"n_tokens": st.integers(20, 500), "context": st.integers(1, 19), "seed": seeds}


@given(**shapes, epoch=st.integers(0, 3))
def test_an_epoch_visits_disjoint_windows_once(
    n_tokens: int, context: int, seed: int, epoch: int
) -> None:
    per_epoch = max(1, (n_tokens - 1) // context - 1)
    indices = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch)
    starts = sorted(order.window_starts(n_tokens, context, seed, indices).tolist())
    assert starts[0] >= 0
    assert starts[-1] + context + 1 <= n_tokens
    assert all(b - a == context for a, b in itertools.pairwise(starts))


@given(**shapes, first=st.integers(0, 6), rows=st.integers(1, 5))
def test_resuming_continues_the_same_order(
    n_tokens: int, context: int, seed: int, first: int, rows: int
) -> None:
    corpus = corpus_of(n_tokens)

    def batches(start: int) -> list:
        return list(
            train_batches(corpus, context, seed=seed, rows=rows, first=start, last=7, workers=0)
        )

    whole, resumed = batches(0), batches(first)
    assert len(whole) == 7
    assert all((a == b).all() for a, b in zip(whole[first:], resumed, strict=True))
    for batch in whole:
        assert batch.shape == (rows, context + 1)
        assert (batch.diff() == 1).all()  # each row is a stretch of the text


@given(n=st.one_of(st.integers(1, 70), st.integers(1, 5000)), seed=seeds)
def test_the_order_is_a_permutation(n: int, seed: int) -> None:
    keys = np.random.SeedSequence(seed).generate_state(order.ROUNDS, np.uint64)
    assert sorted(order.permute(np.arange(n), n, keys).tolist()) == list(range(n))


@given(n=st.integers(1, 2**45), seed=seeds, data=st.data())
def test_a_permutation_too_long_to_list(n: int, seed: int, data: st.DataObject) -> None:
    """Distinct indices keep distinct, in range, and one at a time is as all at once."""
    keys = np.random.SeedSequence(seed).generate_state(order.ROUNDS, np.uint64)
    drawn = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    images = order.permute(np.array(drawn), n, keys).tolist()
    assert len(set(images)) == len(drawn)
    assert 0 <= min(images) <= max(images) < n
    assert images == [order.permute(np.array([i]), n, keys).item() for i in drawn]


def test_an_order_mixes_and_depends_on_seed_epoch_and_source() -> None:
    n, context = 4000, 10
    size = n * context + context + 1  # n windows an epoch
    orders = [
        order.window_starts(size, context, seed, np.arange(epoch * n, epoch * n + n), source)
        for seed, epoch, source in itertools.product((0, 1, 2**32 - 1), (0, 1), (0, 1))
    ]
    ranks = [np.argsort(np.argsort(starts)) for starts in [*orders, np.arange(n)]]
    # Of independent orders, correlations have a deviation of 1 / sqrt(n) = 0.016.
    correlations = np.corrcoef(ranks) - np.eye(len(ranks))
    assert np.abs(correlations).max() < 0.08
    # Neighbours do not stay neighbours.
    assert all(np.mean(np.abs(np.diff(rank)) == 1) < 0.005 for rank in ranks[:-1])


def test_the_order_is_pinned() -> None:
    """A run that is resumed under a later version reads the windows that it would have read."""
    indices = np.array([0, 1, 2, 50, 99, 10**9])
    assert order.window_starts(10_000, 100, 7, indices, 1).tolist() == PINNED
    found = [order.source_of(i, (0.5, 0.3, 0.2))[0] for i in range(10)]
    assert found == PINNED_SOURCES


mixtures = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=8).map(tuple)


@given(weights=mixtures)
def test_every_prefix_has_its_shares(weights: tuple[float, ...]) -> None:
    shares = np.array(weights) / sum(weights)
    seen: Counter[int] = Counter()
    for n in range(200):
        source, place = order.source_of(n, weights)
        assert place == seen[source]
        seen[source] += 1
        counts = order.counts(n + 1, weights)
        assert counts == [seen[i] for i in range(len(weights))]
        assert np.abs(counts - (n + 1) * shares).max() < 3


@given(weights=mixtures, n=st.integers(0, 2**50))
def test_shares_stay_exact_far_on(weights: tuple[float, ...], n: int) -> None:
    counts = order.counts(n, weights)
    assert sum(counts) == n
    assert np.abs(counts - n * (np.array(weights) / sum(weights))).max() < 3 + n * 1e-14
    source, place = order.source_of(n, weights)
    assert place == counts[source]
    assert order.counts(n + 1, weights)[source] == place + 1


@given(
    lengths=st.lists(st.integers(40, 200), min_size=1, max_size=4),
    seed=seeds,
    world=st.integers(1, 4),
    each=st.integers(1, 3),
    data=st.data(),
)
def test_ranks_share_the_windows_of_a_step(
    lengths: list[int], seed: int, world: int, each: int, data: st.DataObject
) -> None:
    draw = st.floats(0.1, 1.0)
    weights = tuple(data.draw(st.lists(draw, min_size=len(lengths), max_size=len(lengths))))
    corpus, rows = corpus_of(*lengths, weights=weights), world * each
    given = {"seed": seed, "rows": rows, "first": 1, "last": 4, "workers": 0}
    whole = list(train_batches(corpus, 7, **given))
    parts = [list(train_batches(corpus, 7, **given, rank=r, world=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        assert np.array_equal(batch, np.concatenate([part[step] for part in parts]))
        sampler = StepSampler(corpus, 7, seed, rows, 1, 4)
        firsts = [10**6 * source + start for source, start in sampler.windows(step + 1)]
        assert batch[:, 0].tolist() == firsts
        told = sampler.describe(step + 1)
        assert all(f"{first % 10**6}-{first % 10**6 + 7}" in told for first in firsts)


def test_each_source_of_a_mixture_has_its_own_epochs() -> None:
    corpus = corpus_of(110, 51, weights=(3.0, 1.0))  # 9 and 4 windows an epoch
    sampler = StepSampler(corpus, 10, 5, 4, 0, 20)
    windows = [window for step in range(20) for window in sampler.windows(step)]
    for source, per_epoch in ((0, 9), (1, 4)):
        starts = [start for of, start in windows if of == source]
        assert len(starts) == (60, 20)[source]
        for i in range(0, len(starts) - per_epoch + 1, per_epoch):
            epoch = sorted(starts[i : i + per_epoch])
            assert all(b - a == 10 for a, b in itertools.pairwise(epoch))


def test_workers_do_not_change_the_order() -> None:
    settings = {"seed": 3, "rows": 4, "first": 2, "last": 6}
    alone = list(train_batches(corpus_of(300, 200, weights=(0.3, 0.7)), 8, **settings, workers=0))
    shared = list(train_batches(corpus_of(300, 200, weights=(0.3, 0.7)), 8, **settings, workers=2))
    assert all((a == b).all() for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize(("most", "batches"), [(0, 5), (2, 2), (9, 5)])
def test_validation_is_spread_and_fixed(most: int, batches: int) -> None:
    corpus = corpus_of(20, n_val=101)
    found = val_batches(corpus, 10, rows=2, max_batches=most)
    assert len(found) == batches
    again = val_batches(corpus, 10, rows=2, max_batches=most)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    assert found[0][0, 0] == 0
    assert found[-1][-1, 0] == 90  # the end is looked at as well


@pytest.mark.parametrize(("most", "counts"), [(0, [20, 10]), (3, [8, 4])])
def test_validation_has_its_shares_of_every_source(most: int, counts: list[int]) -> None:
    """The first source has 30 windows held out and would have 20 for the second's 10."""
    long, short = corpus_of(20, 20, n_val=301).sources
    short = Source(short.train, short.val[:101], "short")
    corpus = Corpus((long, short), (2.0, 1.0), "key")
    windows = np.concatenate(val_batches(corpus, 10, rows=4, max_batches=most))
    assert [int(sum(windows[:, 0] // 10**6 == source)) for source in (0, 1)] == counts
    assert windows[-1, 0] == 10**6 + 90
