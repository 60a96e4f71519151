"""Compressed text: the same text and key as before, streamed, and its damage named."""

import builtins
import gzip
import json
import tracemalloc
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_common.notes import note
from llama_torch import prepare as command
from llama_torch.config import DataConfig
from llama_torch.data import documents
from llama_torch.data.corpus import load_corpus
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import find_files, identify

from ..support.token_shards import LINES, content_of, killed_at, refused


@pytest.fixture(scope="module")
def zstd() -> ModuleType:
    return pytest.importorskip("backports.zstd")


@pytest.fixture(params=["gz", "zst"])
def compress(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    """Return gzip's or zstd's compression of bytes; its ``ending`` is .gz or .zst."""
    module: Any = gzip if request.param == "gz" else pytest.importorskip("backports.zstd")

    def work(content: bytes) -> bytes:
        return module.compress(content)

    work.ending = f".{request.param}"  # type: ignore[attr-defined]
    return work


@given(
    kind=st.sampled_from([".txt", ".md", ".jsonl"]),
    text=st.lists(st.text("a é😀\n\r", max_size=30), max_size=5),
    size=st.integers(4, 30),
    members=st.integers(1, 3),
    bom=st.booleans(),
)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    zstd: ModuleType,
    kind: str,
    text: list[str],
    size: int,
    members: int,
    bom: bool,
) -> None:
    """The pieces of a compressed file, of any number of members, are those of the plain one."""
    root = tmp_path_factory.getbasetemp()
    lines = [json.dumps({"text": one}) + "\n" for one in text] if kind == ".jsonl" else text
    content = documents.BOM * bom + "".join(lines).encode()
    cuts = [len(content) * i // members for i in range(members + 1)]
    parts = [content[i:j] for i, j in pairwise(cuts)]
    plain = root / f"plain{kind}"
    plain.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        wanted = list(documents.pieces([plain], "text"))
        joined = "\n".join(documents.documents([plain], "text"))
        for ending, module in ((".gz", gzip), (".ZST", zstd)):
            path = root / f"plain{kind}{ending}"
            path.write_bytes(b"".join(map(module.compress, parts)))
            found = list(documents.pieces([path], "text"))
            assert [p._replace(path=plain) for p in found] == wanted
            for i, piece in enumerate(found):
                assert list(documents.pieces([path], "text", 0, piece.start)) == found[i:]
            assert "\n".join(documents.documents([path], "text")) == joined
            texts = [identify([one], "text") for one in (plain, path)]
            assert texts[0].key == texts[1].key
            assert texts[1].sizes == (len(content),)


def test_a_killed_preparation_goes_on_in_a_compressed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Any
) -> None:
    monkeypatch.setattr(documents, "PIECE", 500)
    records = [json.dumps({"text": line}) + "\n" for line in LINES]
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, lines in (("a.txt", LINES), ("b.jsonl", records)):
        (folder / f"{name}{compress.ending}").write_bytes(compress("".join(lines).encode()))
        (tmp_path / name).write_text("".join(lines))
    text = identify(find_files([str(folder)]), "text")
    plain = identify([tmp_path / "a.txt", tmp_path / "b.jsonl"], "text")
    assert text.key == plain.key
    prepare(plain, tmp_path / "plain", 1, 1000)
    assert killed_at(5, text, tmp_path / "out", 1) < 0
    prepare(text, tmp_path / "out", 2, 1000)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "plain")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-4],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"never compressed",
        lambda content: content + b"trailing",
        lambda content: content[:30] + bytes([content[30] ^ 255]) + content[31:],
    ],
    ids=["end", "half", "empty", "plain", "more", "flipped"],
)
def test_damage_is_one_line_before_anything_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    compress: Any,
    damage: Callable[[bytes], bytes],
) -> None:
    path = tmp_path / f"a.txt{compress.ending}"
    path.write_bytes(damage(compress("".join(LINES).encode())))
    out = tmp_path / "out"
    assert command.main(["--data", str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --data {path}: cannot be decompressed (")
    assert said.count("\n") == 1
    assert not out.exists()
    config = DataConfig(data=(str(path),), cache_dir=str(tmp_path / "cache"))
    assert "cannot be decompressed" in refused(lambda: load_corpus(config, 50257, 8))
    assert not (tmp_path / "cache").exists()
    assert "cannot be decompressed" in refused(lambda: list(documents.documents([path], "text")))


def test_a_bomb_does_not_fill_memory(tmp_path: Path, compress: Any) -> None:
    size = 1 << 28
    path = tmp_path / f"a.txt{compress.ending}"
    path.write_bytes(compress(bytes(size >> 4)) * 16)
    assert path.stat().st_size < size / 900
    tracemalloc.start()
    text = identify([path], "text")
    pieces = sum(1 for _ in islice(documents.pieces([path], "text"), 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.sizes == (size,)
    assert pieces == 20
    assert peak < 16 << 20


def test_a_window_that_needs_much_memory_is_refused(tmp_path: Path, zstd: ModuleType) -> None:
    parameter = zstd.CompressionParameter
    options = {parameter.window_log: 31, parameter.enable_long_distance_matching: 1}
    maker = zstd.ZstdCompressor(options=options)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(maker.compress(b"text") + maker.flush())
    assert f"zstd -d --long=31 {path}" in refused(lambda: identify([path], "text"))


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("backports", "compression"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt.zst").write_bytes(b"text")
    monkeypatch.setattr(builtins, "__import__", without)
    assert command.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: --data {tmp_path}/b.txt.zst: reading .zst needs backports.zstd; "
        "pip install 'llama-parity[zstd]'"
    )


def test_other_compressions_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.parquet.gz", "a.gz", "a.txt.bz2"):
        (tmp_path / name).write_bytes(b"text")
        assert f"{name}: not one of .txt" in refused(
            lambda name=name: find_files([str(tmp_path / name)])
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_null_is_left_out_and_counted_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = ["one", None, "", "null", None, "two"]
    table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    ids = []
    for name in ("a.parquet", "b.jsonl"):
        files = [tmp_path / name]
        assert list(documents.documents(files, "text")) == ["one", "", "null", "two"]
        ids.append(prepare(identify(files, "text"), tmp_path / f"{name} out", workers)[:].tolist())
        line = f"note: --data: 2 records left out whose text is null, first in {files[0]}\n"
        assert capsys.readouterr().err == line
        note.cache_clear()
    assert ids[0] == ids[1]
    for name in ("a.parquet", "b.jsonl"):  # what is in the cache says it again
        files = [(tmp_path / name).rename(tmp_path / f"moved {name}")]
        prepare(identify(files, "text"), tmp_path / f"{name} out", workers)
        said = capsys.readouterr().err
        assert said == f"note: --data: 2 records left out whose text is null, first in {files[0]}\n"
        note.cache_clear()
        load_corpus(DataConfig(data=(str(tmp_path / f"{name} out"),), val_fraction=0.4), 50257, 1)
        line = "note: --data: 2 records left out whose text is null, first in file 1 of the text\n"
        assert capsys.readouterr().err == line
        note.cache_clear()
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"body": null}\n')
    assert "c.jsonl: line 2 is not" in refused(
        lambda: list(documents.documents([tmp_path / "c.jsonl"], "text"))
    )


@pytest.mark.parametrize("is_right", [True, False])
def test_a_line_that_takes_memory_out_of_proportion_is_refused(
    is_right: bool,
    compress: Callable[[bytes], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a compressed file alone: the lines of another are no longer than the file."""
    monkeypatch.setattr(documents, "PIECE", 20)
    monkeypatch.setattr(documents, "LONGEST", 400)
    line = json.dumps({"text": "a" * (300 if is_right else 3000)}).encode() + b"\n"
    content = b'{"text": "b"}\n' + line
    path, plain = tmp_path / f"a.jsonl{compress.ending}", tmp_path / "a.jsonl"  # type: ignore[attr-defined]
    path.write_bytes(compress(content))
    plain.write_bytes(content)
    wanted = list(documents.documents([plain], "text"))
    assert len(wanted) == 2
    if is_right:
        assert list(documents.documents([path], "text")) == wanted
        return
    said = "a line of it is longer than 400 bytes; decompress"
    with pytest.raises(InputError, match=f"^--data {path}: {said}"):
        list(documents.documents([path], "text"))
