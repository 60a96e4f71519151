"""Text to tokens: what is read, what is refused, and what a mixture is."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llama_common.errors import InputError
from llama_common.settings import check_settings
from llama_torch import train
from llama_torch.config import DataConfig, TrainConfig
from llama_torch.data import documents
from llama_torch.data.corpus import Corpus, describe, load_corpus
from llama_torch.data.loader import train_batches, val_batches
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import find_files, identify
from llama_torch.tokenizer.gpt2 import END_OF_TEXT_ID, gpt2
from llama_torch.training import loop
from llama_torch.training.run_file import differences
from llama_torch.training.step import train_step

WORDS = "the quick brown fox jumps over the lazy dog " * 20


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
    stored = check_settings(one.identity(), TrainConfig, "run.json")
    differing = differences(stored, other)
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
