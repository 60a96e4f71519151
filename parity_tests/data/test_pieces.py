"""Pieces of text: their ids are those of the whole, and none holds much."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_torch.data import documents
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import identify
from llama_torch.tokenizer.gpt2 import gpt2

from ..support.token_shards import refused

# White space of every kind, what GPT-2's pattern treats apart, and characters of 1 to 4 bytes.
SPACES = "   \n\n\r\t\x0b\x1c\x85\u00a0\u2003\u3000"
OTHERS = "ab'sl19.!<é中あ한😀\u0301ß"
runs = st.text(SPACES, max_size=4) | st.text(OTHERS, min_size=1, max_size=6)
texts = st.lists(runs, max_size=12).map("".join)


def ids_of(text: str) -> list[int]:
    return gpt2().encode_ordinary(text.replace("\r\n", "\n").replace("\r", "\n"))


@given(text=texts)
@example("a\r\nb")
@example("a\n\n\n\nb")
@example("a\n\n  b")
@example("a\n\n\u3000b")
@example("a\n\n\u2003b")
@example("a\n\n\u00a0b")
def test_text_cut_at_a_border_has_the_ids_of_the_whole(text: str) -> None:
    content = text.encode()
    found = documents.BORDER.match(content)
    while found and found.start(1):
        cut = found.start(1)
        parts = content[:cut].decode(), content[cut:].decode()
        assert ids_of(parts[0]) + ids_of(parts[1]) == ids_of(text), parts
        found = documents.BORDER.match(content[:cut])


@given(text=texts, size=st.integers(4, 30), bom=st.booleans())
@example("aa\r\naaaa", 4, False)
def test_pieces_are_the_whole_text_from_wherever_one_begins(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int, bom: bool
) -> None:
    """Text without borders is cut too, between characters and never within a line end."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(documents.BOM * bom + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = list(documents.pieces([path], "text"))
        assert all(0 < len(piece.content) <= size for piece in pieces)
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * (
            len(pieces) > 0
        )
        found = [part for piece in pieces for part in documents.texts(piece, "text")]
        # A byte-order mark that is text, after the first, stays.
        assert "".join(found) == text.replace("\r\n", "\n").replace("\r", "\n")
        for i, piece in enumerate(pieces):
            assert list(documents.pieces([path], "text", 0, piece.start)) == pieces[i:]


def test_a_column_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Not even where all rows are one group, as some tools write them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rng, path = np.random.default_rng(0), tmp_path / "a.parquet"
    rows = [rng.bytes(8000).hex() for _ in range(2500)]
    table = pyarrow.table({"text": rows})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    del table
    pool = pyarrow.default_memory_pool()
    before, size = pool.bytes_allocated(), path.stat().st_size
    held = [pool.bytes_allocated() - before for _ in documents.pieces([path], "text")]
    assert len(held) > 10
    assert max(held) < size * 0.7  # some 18 MB are held whatever the size


@pytest.mark.parametrize("workers", [1, 2])
def test_half_of_a_surrogate_pair_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The tokenizer would replace it by U+FFFD."""
    monkeypatch.setattr(documents, "PIECE", 50)
    path = tmp_path / "a.jsonl"
    pair, half = r'{"text": "\ud83d\ude00"}', r'{"text": "a \ud83d b"}'
    other = r'{"text": "a", "title": "\ude00"}'
    path.write_text("\n".join([pair] * 9 + [other] * 9) + "\n")
    assert list(documents.documents([path], "text")) == ["\U0001f600"] * 9 + ["a"] * 9
    prepare(identify([path], "text"), tmp_path / "whole", workers)
    path.write_text("\n".join([pair] * 9 + ["", half, pair]))
    text = identify([path], "text")
    for read in (
        lambda: list(documents.documents([path], "text")),
        lambda: prepare(text, tmp_path / "out", workers),
    ):
        said = refused(read)
        assert said.startswith(
            f"--data {path}: line 11: the text in 'text' is not valid: it holds half"
        )


def test_a_text_of_parquet_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"a", b"\xed\xa0\xbd"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    said = refused(lambda: list(documents.documents([tmp_path / "a.parquet"], "text")))
    assert said.startswith(f"--data {tmp_path}/a.parquet: a text of the rows from 0 on cannot be")
