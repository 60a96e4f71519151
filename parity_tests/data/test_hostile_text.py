"""Text files that ask for memory, or are damaged: bounded, and one line with the right remedy."""

import gzip
from pathlib import Path

import pytest

from llama_common.errors import InputError
from llama_torch.data import documents
from llama_torch.data.text_files import identify


def read(path: Path, field: str = "text") -> list[str]:
    return list(documents.documents([path], field))


def test_a_bomb_is_read_in_pieces(tmp_path: Path) -> None:
    """32 MiB of blanks in 150 KiB: identified, and cut, in the memory of a piece."""
    tracemalloc = pytest.importorskip("tracemalloc")
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 25), 1))
    tracemalloc.start()
    try:
        assert identify([path], "text").sizes == (1 << 25,)
        for piece in documents.pieces([path], "text"):
            assert len(piece.content) <= documents.PIECE
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_what_is_wrong_with_a_parquet_file_is_told_apart(tmp_path: Path) -> None:
    """Another column is named with --text-field; a damaged file is copied again."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x" * 5000] * 50, "n": range(50)}), path)
    assert read(path, "body") == ["x" * 5000] * 50
    with pytest.raises(InputError, match=r"no column 'text', but 'body', 'n'; name it by --te"):
        read(path)
    with pytest.raises(InputError, match=r"value is int.*; name the column with --text-field"):
        read(path, "n")
    whole = path.read_bytes()
    page = bytearray(whole)
    page[4:60] = b"\xff" * 56
    for content in (whole[:-20], whole[: len(whole) // 2], b"", bytes(page)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="copy it again, or leave it out") as error:
            read(path, "body")
        assert "--text-field" not in str(error.value)
