"""Text to tokens to batches: what is read, what is refused, and an order that never varies."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_torch import data
from llama_torch.config import DataConfig, InputError
from llama_torch.data import (
    Corpus,
    documents,
    find_files,
    load_corpus,
    train_batches,
    val_batches,
    window_start,
)
from llama_torch.tokenizer import END_OF_TEXT_ID, gpt2

from .strategies import seeds

WORDS = "the quick brown fox jumps over the lazy dog " * 20


def corpus_of(n_train: int, n_val: int = 50) -> Corpus:
    return Corpus(np.arange(n_train), np.arange(n_val), "key", "numbers")


shapes = {"n_tokens": st.integers(20, 500), "context": st.integers(1, 19), "seed": seeds}


@given(**shapes, epoch=st.integers(0, 3))
def test_an_epoch_visits_disjoint_windows_once(
    n_tokens: int, context: int, seed: int, epoch: int
) -> None:
    per_epoch = max(1, (n_tokens - 1) // context - 1)
    indices = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    starts = sorted(window_start(n_tokens, context, seed, i) for i in indices)
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


def test_another_seed_is_another_order() -> None:
    orders = [[window_start(10_000, 10, seed, i) for i in range(50)] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_workers_do_not_change_the_order() -> None:
    settings = {"seed": 3, "rows": 4, "first": 2, "last": 6}
    alone = list(train_batches(corpus_of(300), 8, **settings, workers=0))
    shared = list(train_batches(corpus_of(300), 8, **settings, workers=2))
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


def test_the_built_in_corpus() -> None:
    corpus = load_corpus(DataConfig(), 50257, 256)
    assert len(corpus.train) + len(corpus.val) > 100_000
    assert len(corpus.val) == (len(corpus.train) + len(corpus.val)) // 10
    assert "Python" in gpt2().decode(corpus.train[:2000].tolist())


def test_text_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    config = DataConfig(data=(str(file),), cache_dir=str(tmp_path / "cache"), val_fraction=0.3)
    first = load_corpus(config, 50257, 8)
    assert isinstance(first.train, np.memmap)
    assert first.train.dtype == np.uint16

    def refuse(texts: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data, "_encode", refuse)
    again = load_corpus(config, 50257, 8)
    assert np.array_equal(first.train, again.train)
    moved = tmp_path / "b.txt"
    file.rename(moved)  # the key is the content, not the name
    load_corpus(DataConfig(data=(str(moved),), cache_dir=config.cache_dir), 50257, 8)
    moved.write_text(WORDS + "changed")
    with pytest.raises(AssertionError, match="tokenised again"):
        load_corpus(DataConfig(data=(str(moved),), cache_dir=config.cache_dir), 50257, 8)


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
    assert list(documents(files, "text")) == [
        "text file",
        "one",
        "two",
        "three",
        "four",
        "# markdown é",
    ]
    assert find_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]) == [tmp_path / "a.txt"]
    tokens = data._encode(documents(find_files([str(tmp_path / "c.jsonl")]), "text"))
    assert tokens.tolist() == [505, END_OF_TEXT_ID, 11545, END_OF_TEXT_ID]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"x", "a.bin: not one of .txt"),
        ("a.txt", b"\xff\xfe", "a.txt: cannot be read as UTF-8"),
        ("a.txt", b"", "training part has 0"),
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


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS + "for damage")
    config = DataConfig(data=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"))
    load_corpus(config, 50257, 8)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    cached.write_bytes(cached.read_bytes()[:-7])
    with pytest.raises(InputError, match="damaged token cache"):
        load_corpus(config, 50257, 8)
