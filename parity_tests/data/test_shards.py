"""Token shards: what they hold, and no damage without a clear word."""

import gc
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_torch import prepare as data
from llama_torch.config import DataConfig
from llama_torch.data import shard_check, shards
from llama_torch.data.corpus import Corpus, Source, load_corpus
from llama_torch.data.loader import train_batches
from llama_torch.data.shard_writer import prepare
from llama_torch.data.shards import TokenShards
from llama_torch.data.text_files import Text, identify
from llama_torch.tokenizer.gpt2 import END_OF_TEXT_ID, gpt2

from ..support.token_shards import LINES, content_of, edit, refused, truncate


def test_shards_are_the_documents(text: Text, tmp_path: Path) -> None:
    expected = []
    for document in ["".join(LINES), *LINES, *LINES, "The end."]:
        expected += [*gpt2().encode_ordinary(document), END_OF_TEXT_ID]
    found = prepare(text, tmp_path / "out", 1, 1000)
    assert found[:].tolist() == expected
    assert found.dtype == np.uint16
    assert len(found) == len(expected)
    assert found[995:2003].tolist() == expected[995:2003]  # over three shards
    borders = [0, 1, 17, 500, 999, 1000, 1001, 2000, 2001, len(expected) - 1, len(expected)]
    for start, stop in itertools.combinations_with_replacement(borders, 2):
        assert found[start:stop].tolist() == expected[start:stop]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["tokens"] for shard in index["shards"][:-1]] == [1000] * (len(expected) // 1000)
    assert index["highest"] == END_OF_TEXT_ID
    assert shard_check.damaged_shards(found) == []


def test_a_text_without_tokens_has_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    found = prepare(identify([tmp_path / "a.txt"], "text"), tmp_path / "out", 1, 10)
    assert (len(found), found.index.highest, found.index.shards) == (0, -1, ())
    assert found[:].tolist() == []


def test_the_number_of_processes_changes_nothing(text: Text, tmp_path: Path) -> None:
    prepare(text, tmp_path / "one", 1, 1000)
    prepare(text, tmp_path / "three", 3, 1000)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "three")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "00001.bin: token shard has 1998 bytes and should have 2000"),
        (Path.unlink, "00001.bin: token shard cannot be read (No such file"),
        (lambda path: truncate(path.parent / "index.json"), "index.json: is not JSON"),
        (lambda path: (path.parent / "index.json").unlink(), "index.json: cannot be read"),
        (edit(tokens=5), "damaged index (its shards do not add up to 5 tokens)"),
        (edit(tokens="5"), "damaged index (tokens is '5')"),
        (edit(shards=[{}]), "damaged index ("),
        (edit(shards=None), "damaged index ("),
        (edit(more=1), "damaged index ("),
        (edit(nulls="2"), "damaged index (nulls is '2')"),
        (edit(dtype="float16"), "damaged index (dtype 'float16'"),
        (edit(shard_tokens=0), "damaged index (dtype 'uint16', 0"),
        (edit(version=2), "index.json: is not of format"),
        (edit(encoding="else"), "index.json: holds ids of another tokenizer"),
    ],
)
def test_damage_is_named_before_a_run(
    text: Text, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    prepare(text, tmp_path / "out", 1, 1000)
    damage(tmp_path / "out" / "00001.bin")
    config = DataConfig(data=(str(tmp_path / "out"),))
    assert message in refused(lambda: load_corpus(config, 50257, 8))


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES))
    config = DataConfig(data=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"))
    load_corpus(config, 50257, 8)
    (cached,) = (tmp_path / "cache").glob("*/*.bin")
    truncate(cached)
    assert f"delete {cached.parent}" in refused(lambda: load_corpus(config, 50257, 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_during_a_run(text: Text, tmp_path: Path, workers: int) -> None:
    """Of a mapped file this would be SIGBUS, and the end of the process without a word."""
    tokens = prepare(text, tmp_path / "out", 1, 1000)
    corpus = Corpus((Source(tokens, tokens, "text"),), (1.0,), "key")
    settings = {"seed": 0, "rows": 8, "first": 0, "last": 50, "workers": workers}
    batches = train_batches(corpus, 8, **settings)
    next(batches)
    for path in (tmp_path / "out").glob("*.bin"):
        os.truncate(path, 100)
    said = refused(lambda: list(batches))
    assert ".bin: token shard was cut short while it was in use; copy it back" in said
    assert not multiprocessing.active_children()  # nothing holds the loader, and so its process


def test_many_shards_keep_few_files_open(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "OPEN", 3)
    prepare(text, tmp_path / "out", 1, 100)

    def n_open() -> int:
        paths = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        return sum(path.startswith(f"{tmp_path}/out/") for path in paths)

    def use() -> None:
        found = TokenShards(tmp_path / "out")
        whole = found[:]
        assert len(found.index.shards) > 20
        assert n_open() == 3
        os.truncate(tmp_path / "out" / "00000.bin", 0)
        assert "00000.bin: token shard has 0 bytes" in refused(lambda: found[:5])
        assert np.array_equal(found[150:250], whole[150:250])

    use()
    gc.collect()  # the refusal's traceback
    assert n_open() == 0


def test_ids_that_need_32_bits(tmp_path: Path, text: Text) -> None:
    prepare(text, tmp_path / "out", 1, 1000)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for shard in index["shards"]:
        path = tmp_path / "out" / shard["name"]
        (np.fromfile(path, "<u2").astype("<u4") + 100_000).tofile(path)
    edit(dtype="uint32", highest=index["highest"] + 100_000)(path)
    found = TokenShards(tmp_path / "out")
    assert found.dtype == np.uint32
    assert found[:].min() >= 100_000
    config = DataConfig(data=(str(tmp_path / "out"),))
    assert "use at least 150257" in refused(lambda: load_corpus(config, 50257, 8))


def test_the_command_line(text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    flags = ["--data", *map(str, text.files), "--out", out, "--shard-tokens", "1000"]
    for _ in range(2):  # the second has nothing to do
        assert data.main([*flags, "--workers", "1"]) == 0
        assert "tokens in 3 shards of uint16" in capsys.readouterr().out
    assert data.main(["--verify", out]) == 0
    assert "3 of 3 shards are as written" in capsys.readouterr().out
    path = tmp_path / "out" / "00002.bin"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert data.main(["--verify", out]) == 1
    said = capsys.readouterr().out
    assert f"{path}: is not what was written" in said
    assert "2 of 3" in said
    for argv, message in (
        (["--data", flags[1]], "--out is needed"),
        (["--out", out, "--shard-tokens", "0"], "--shard-tokens must be positive"),
        (["--out", out, "--workers", "-1"], "--workers must not be negative"),
        (["--verify", str(tmp_path)], "index.json: cannot be read"),
    ):
        assert data.main(argv) == 2
        assert message in capsys.readouterr().err
