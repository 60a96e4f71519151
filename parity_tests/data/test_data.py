"""Text to tokens to batches: what is read, what is refused, and an order that never varies."""

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.common.errors import InputError
from llama_torch.config import DataConfig, TrainConfig
from llama_torch.data import documents, order
from llama_torch.data.corpus import Corpus, Source, describe, load_corpus
from llama_torch.data.documents import find_files, identify
from llama_torch.data.loader import StepSampler, train_batches, val_batches
from llama_torch.data.shard_writer import prepare
from llama_torch.tokenizer.gpt2 import END_OF_TEXT_ID, gpt2
from llama_torch.training import loop, run_dir
from llama_torch.training.step import train_step

from ..conformance.strategies import seeds

WORDS = "the quick brown fox jumps over the lazy dog " * 20


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
    found = val_batches(corpus, 10, rows=2, most=most)
    assert len(found) == batches
    again = val_batches(corpus, 10, rows=2, most=most)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    assert found[0][0, 0] == 0
    assert found[-1][-1, 0] == 90  # the end is looked at as well


@pytest.mark.parametrize(("most", "counts"), [(0, [20, 10]), (3, [8, 4])])
def test_validation_has_its_shares_of_every_source(most: int, counts: list[int]) -> None:
    """The first source has 30 windows held out and would have 20 for the second's 10."""
    long, short = corpus_of(20, 20, n_val=301).sources
    short = Source(short.train, short.val[:101], "short")
    corpus = Corpus((long, short), (2.0, 1.0), "key")
    windows = np.concatenate(val_batches(corpus, 10, rows=4, most=most))
    assert [int(sum(windows[:, 0] // 10**6 == source)) for source in (0, 1)] == counts
    assert windows[-1, 0] == 10**6 + 90


def test_the_built_in_corpus() -> None:
    corpus = load_corpus(DataConfig(), 50257, 256)
    (source,) = corpus.sources
    assert len(source.train) + len(source.val) > 100_000
    assert len(source.val) == (len(source.train) + len(source.val)) // 10
    assert "Python" in gpt2().decode(source.train[:2000].tolist())


def test_parts_of_exactly_one_window_are_enough(tmp_path: Path) -> None:
    """And a vocabulary that ends with the highest id; one fewer of anything is refused."""
    (tmp_path / "a.txt").write_text("a" + " b" * 38)  # 40 tokens with the end

    def load(context: int, val_fraction: float, vocab_size: int = 50257) -> Corpus:
        folder, file = str(tmp_path / "cache"), str(tmp_path / "a.txt")
        config = DataConfig(data=(file,), cache_dir=folder, val_fraction=val_fraction)
        return load_corpus(config, vocab_size, context)

    corpus = load(19, 0.5)
    (source,) = corpus.sources
    whole = [*source.train[:].tolist(), *source.val[:].tolist()]
    assert len(source.train) == len(source.val) == 20
    assert [batch.tolist() for batch in val_batches(corpus, 19, 2, 0)] == [[whole[20:]]]
    settings = {"seed": 0, "rows": 2, "first": 0, "last": 2, "workers": 0}
    read = [row for batch in train_batches(corpus, 19, **settings) for row in batch.tolist()]
    assert read == [whole[:20]] * 4
    for context, fraction, kind, n in (
        (20, 0.5, "training", 20),
        (19, 0.499, "validation", 19),  # a part of a token is trained on
        (19, 0.53, "training", 19),
    ):
        with pytest.raises(InputError, match=f"{context + 1} tokens and the {kind} part .* {n};"):
            load(context, fraction)
    with pytest.raises(InputError, match="--vocab-size 50256 is too small.*at least 50257"):
        load(19, 0.5, 50256)


def test_text_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    config = DataConfig(data=(str(file),), cache_dir=str(tmp_path / "cache"), val_fraction=0.3)
    first = load_corpus(config, 50257, 8)

    def refuse(*args: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(documents, "encode", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)  # the highest id is known
        again = load_corpus(config, 50257, 8)
    for part in ("train", "val"):
        one, other = (getattr(corpus.sources[0], part)[:] for corpus in (first, again))
        assert np.array_equal(one, other)
    moved = tmp_path / "b.txt"
    file.rename(moved)  # the key is the content, not the name
    load_corpus(DataConfig(data=(str(moved),), cache_dir=config.cache_dir), 50257, 8)
    moved.write_text(WORDS + "changed")
    with pytest.raises(AssertionError, match="read again"):
        load_corpus(DataConfig(data=(str(moved),), cache_dir=config.cache_dir), 50257, 8)


def test_a_mixture_of_text_and_shards(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(WORDS + name)
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    prepare(identify(find_files(files[1:]), "text"), tmp_path / "shards", 1, 50)
    shards = str(tmp_path / "shards")

    def corpus(*data: str, weights: tuple[float, ...] = ()) -> Corpus:
        return load_corpus(DataConfig(data=data, weights=weights), 50257, 8)

    mixed = corpus(files[0], shards, weights=(3, 1))
    assert mixed.key == corpus(*files, weights=(3, 1)).key  # the same tokens
    assert corpus(shards).key == corpus(files[1]).key
    keys = {mixed.key, corpus(*files).key, corpus(files[0]).key, corpus(files[1]).key}
    assert len(keys | {corpus(*files[::-1], weights=(3, 1)).key}) == 5
    assert describe(mixed).startswith(f"75.0% {files[0]}: 164 training tokens, 18 held out; 25.0%")
    with pytest.raises(InputError, match="cannot be joined to other text"):
        corpus(files[0], shards)
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match="training part of .*short.txt has 4"):
        corpus(files[0], str(tmp_path / "short.txt"), weights=(3, 1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0,), "a number for each of the 2"), ((1.0, 0.0), "positive"), ((1.0, np.inf), "finite")],
)
def test_weights_that_are_none(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"--weights must be .*{message}"):
        DataConfig(data=("a", "b"), weights=weights)


def test_what_decides_the_losses_is_in_the_identity() -> None:
    one = TrainConfig(data=DataConfig(data=("a", "b"), weights=(0.7, 0.3), cache_dir="x"))
    other = TrainConfig(data=DataConfig(data=("c",), pack_documents=True))
    differing = run_dir._differences(one.identity(), other.identity())
    assert [line.split()[0] for line in differing] == ["--pack-documents", "--weights"]


def test_a_mixed_and_packed_run_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name} one two"}}\n' * 60)
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    flags = ["--data", *files, "--weights", "0.7", "0.3", "--pack-documents", "--device", "cpu"]
    flags += ["--dim", "8", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1"]
    flags += ["--max-seq-len", "16", "--steps", "4", "--save-every", "2", "--sample-every", "0"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train.main([*flags, "--dry-run"]) == 0
    assert train.main([*flags, "--out", str(whole)]) == 0
    real, taken = train_step, iter(range(3))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(taken, None) is None:
            raise KeyboardInterrupt
        assert all(batch.mask is not None for batch in args[2])
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopped)
        assert train.main([*flags, "--out", str(out)]) == 130
    for more, message in (
        (["--weights", "0.6", "0.4"], "--weights is [0.7, 0.3] there and [0.6, 0.4] here"),
        (["--no-pack-documents"], "--pack-documents is True there and False here"),
    ):
        assert train.main(["--resume", "--out", str(out), *more]) == 2
        assert message in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(out)]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_kind_of_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext file")
    (tmp_path / "sub" / "b.md").write_text("# markdown é")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "other": 1}\n')
    parquet.write_table(pyarrow.table({"text": ["three", "four"]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    files = find_files([str(tmp_path)])
    assert list(documents.documents(files, "text")) == [
        "text file",
        "one",
        "two",
        "three",
        "four",
        "# markdown é",
    ]
    assert find_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]) == [tmp_path / "a.txt"]
    text = identify(find_files([str(tmp_path / "c.jsonl")]), "text")
    tokens = prepare(text, tmp_path / "shards")
    assert tokens[:].tolist() == [505, END_OF_TEXT_ID, 11545, END_OF_TEXT_ID]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"x", "a.bin: not one of .txt"),
        ("a.txt", b"\xff\xfe", "a.txt: cannot be read as UTF-8"),
        ("a.txt", b"", "training part of .*a.txt has 0"),
        ("a.txt", b"a few words", "--max-seq-len 8 needs 9 tokens"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"body": "a"}\n', "--text-field"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_unusable_text_names_the_file(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    config = DataConfig(data=(str(tmp_path / name),), cache_dir=str(tmp_path))
    with pytest.raises(InputError, match=message):
        load_corpus(config, 50257, 8)


def test_missing_text_and_small_vocabulary(tmp_path: Path) -> None:
    for pattern in (str(tmp_path / "none.txt"), str(tmp_path / "*.md"), str(tmp_path)):
        with pytest.raises(InputError, match="no file found"):
            find_files([pattern])
    (tmp_path / "a.txt").write_text(WORDS)
    config = DataConfig(data=(str(tmp_path / "a.txt"),))
    with pytest.raises(InputError, match="--vocab-size 300 is too small.*use at least"):
        load_corpus(config, 300, 8)
    blocked = DataConfig(data=config.data, cache_dir=str(tmp_path / "a.txt" / "below"))
    with pytest.raises(InputError, match="--cache-dir"):
        load_corpus(blocked, 50257, 8)
