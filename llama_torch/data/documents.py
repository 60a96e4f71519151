"""Read text files as documents, and as pieces of bounded size for tokenisation."""

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_common.errors import InputError, has_surrogates
from llama_common.help_topics import help_topics
from llama_common.notes import note

from ..common.torchrun import is_main_process
from ..tokenizer.encoding import GPT2, TextEncoding
from ..tokenizer.gpt2 import located
from .formats import STRUCTURED, is_compressed, lines_before, open_decompressed, text_format

PIECE = 1 << 20  # bytes of text tokenised at a time
LONGEST = 1 << 26  # bytes of a compressed file's line: a small file could hold gigabytes in one
ROWS = 64  # rows of a .parquet file decoded at a time
BOM = b"\xef\xbb\xbf"  # byte-order mark, skipped
# The last place before white space that something else follows. GPT-2's pretokeniser always begins
# a token there (it leaves the last white space of a run to what follows), and looks at nothing
# before it: the ids of the two parts are those of the whole. Of another tokenizer the text is that
# of the whole, and its ids but for a few at a border. What follows is told by its first byte; the
# first bytes left out begin white space as well.
BORDER = re.compile(rb"(?s:.*)((?<!\r)\n|\r\n| )(?=[!-~\xc3-\xdf\xe4-\xf4]|\xe3[\x81-\xbf])")


class TextPiece(NamedTuple):
    """A piece of one file's text, to be tokenised by one process."""

    path: Path | None
    file: int  # index in the list of files
    start: int  # offset in the file: decompressed bytes, or rows of a .parquet file
    content: bytes | tuple[str | None, ...]  # a slice of the file, or whole documents; None = null
    is_last: bool  # the last piece of its file
    n_bytes: int  # bytes of the file it covers, estimated for .parquet
    is_first: bool = True  # the first piece of its file, where that is one document


class Nulls(NamedTuple):
    """The records that are left out since their text is null."""

    n: int = 0
    first: int = -1  # index, in the list of files, of the first file with one; -1 = none

    def plus(self, n: int, file: int) -> "Nulls":
        """Return the count with the ``n`` nulls of a piece of a file added."""
        return Nulls(self.n + n, file if n and not self.n else self.first)

    def print(self, files: Sequence[Path]) -> None:
        """Print the count, on the main process, unless it is 0; ``files`` may be unknown."""
        if self.n and is_main_process():
            known = dict(enumerate(files))
            first = known.get(self.first, f"file {self.first + 1} of the text")
            s = "s" * (self.n > 1)
            note(f"--data: {self.n} record{s} left out whose text is null, first in {first}")


def documents(files: Sequence[Path], text_field: str) -> Iterator[str]:
    """Yield the text of every document; without files, of Python's help topics."""
    nulls = Nulls()
    if not files:
        yield from help_topics()
    for number, path in enumerate(files):
        if text_format(path) in STRUCTURED:
            for piece in pieces([path], text_field):
                for _, text in _numbered(piece, text_field):
                    if text is None:
                        nulls = nulls.plus(1, number)
                    else:
                        yield text
        else:
            found = (t for piece in pieces([path], text_field) for t in texts(piece, text_field))
            yield "".join(found)
    nulls.print(files)


def document_place(files: Sequence[Path], text_field: str, number: int) -> str:
    """Return the file and place of the ``number``-th document, for a message; reads them again."""
    for path in files:
        n = 1
        if text_format(path) in STRUCTURED:
            n = sum(1 for piece in pieces([path], text_field) for _ in texts(piece, text_field))
        if number <= n:
            return f"--data {path}: document {number}"
        number -= n
    return f"--data: document {number}"


def pieces(
    files: Sequence[Path], text_field: str, file: int = 0, start: int = 0
) -> Iterator[TextPiece]:
    """Yield pieces of about PIECE bytes in order, from the start of a piece on.

    A .txt or .md file is cut at BORDER, so that its ids are those of the whole file; PIECE
    bytes without one are cut at their end. A record of .jsonl or .parquet is never cut.
    """
    if not files and file == 0:
        yield TextPiece(None, 0, 0, tuple(help_topics()), True, 0)
    for number, path in enumerate(files[file:], file):
        offset = start if number == file else 0
        try:
            if text_format(path) == ".parquet":
                yield from _parquet_pieces(path, number, offset, text_field)
            else:
                yield from _file_pieces(path, number, offset)
        except OSError as error:
            raise InputError(f"--data {path}: cannot be read ({error})") from None


def _file_pieces(path: Path, number: int, start: int) -> Iterator[TextPiece]:
    is_jsonl = text_format(path) == ".jsonl"
    with open_decompressed(path) as file:
        size = 0 if is_compressed(path) else os.fstat(file.fileno()).st_size
        rest = file.read(len(BOM)) if start in (0, len(BOM)) else b""
        is_first = start == 0 or rest == BOM
        if rest == BOM:
            start = len(BOM)
        if start:
            rest = b""
        file.seek(start + len(rest))
        # A compressed file is read once, forwards: it has no cheap way back, and no known size.
        rest = rest or file.read(1)
        while rest:
            rest += file.read(PIECE + 1 - len(rest))
            content, rest = _cut_record(rest, file, path) if is_jsonl else _cut_text(rest)
            rest = rest or file.read(1)
            yield TextPiece(path, number, start, content, not rest, len(content), is_first)
            start, is_first = start + len(content), False
        if start < size:
            raise InputError(f"--data {path}: shrank while it was read; run this again")


def _cut_record(content: bytes, file: IO[bytes], path: Path) -> tuple[bytes, bytes]:
    """Return PIECE + 1 bytes and the rest of the last line; nothing remains."""
    if len(content) <= PIECE or content.endswith(b"\n"):
        return content, b""
    rest = file.readline(LONGEST if is_compressed(path) else -1)
    if is_compressed(path) and len(rest) == LONGEST and not rest.endswith(b"\n"):
        raise InputError(
            f"--data {path}: a line of it is longer than {LONGEST:,} bytes; decompress the file if "
            "that is right, or leave it out"
        )
    return content + rest, b""


def _cut_text(content: bytes) -> tuple[bytes, bytes]:
    """Return up to PIECE bytes, cut at a border unless they are all, and the remaining ones."""
    if len(content) <= PIECE:
        return content, b""
    cut = _border(content[:PIECE])
    return content[:cut], content[cut:]


def _border(content: bytes) -> int:
    """Return the offset to cut at: the last BORDER, else before the last character."""
    found = BORDER.match(content)
    if found and found.start(1):
        return found.start(1)
    cut = len(content) - 1
    while cut > 0 and (content[cut] & 0xC0 == 0x80 or content[cut - 1 : cut + 1] == b"\r\n"):
        cut -= 1
    return cut or len(content)


def _parquet_pieces(path: Path, number: int, start: int, text_field: str) -> Iterator[TextPiece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"--data {path}: reading .parquet needs pyarrow; pip install 'llama-parity[parquet]'"
        ) from None
    try:
        known = pyarrow.parquet.read_schema(path).names
        if text_field not in known:
            shown = ", ".join(map(repr, known[:8]))
            raise InputError(
                f"--data {path}: has no column {text_field!r}, but {shown}; name it by --text-field"
            )
        # Otherwise a row group's whole column is in memory at once, and may be all of the file.
        table = pyarrow.parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False)
        row_bytes = path.stat().st_size / max(1, table.metadata.num_rows)
        done, n_characters = 0, 0
        found: list[str | None] = []
        for batch in table.iter_batches(ROWS, columns=[text_field], use_threads=False):
            skipped = min(len(batch), max(0, start - done))
            done += len(batch)
            for text in batch.column(text_field).slice(skipped).to_pylist():
                if not isinstance(text, str | None):
                    raise InputError(
                        f"--data {path}: not a parquet file with a text column {text_field!r} (a "
                        f"value is {type(text).__name__}); name the column with --text-field"
                    )
                found.append(text)
                n_characters += len(text or " ")  # a null takes memory too
            if n_characters >= PIECE:
                n_bytes = int(row_bytes * (done - start))
                yield TextPiece(path, number, start, tuple(found), False, n_bytes)
                start, found, n_characters = done, [], 0
        yield TextPiece(
            path, number, start, tuple(found), True, int(row_bytes * max(0, done - start))
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data {path}: a text of the rows from {start} on cannot be read as UTF-8 "
            f"({error.reason}); convert it"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"--data {path}: not a parquet file that can be read ({error}); copy it again, or "
            "leave it out"
        ) from None


def texts(piece: TextPiece, text_field: str) -> Iterator[str]:
    """Yield the texts of a piece's documents, or its part of one document; nulls are left out."""
    return (text for _, text in _numbered(piece, text_field) if text is not None)


def _numbered(piece: TextPiece, text_field: str) -> Iterator[tuple[int, str | None]]:
    """Yield (number, text or null) of a piece's documents; ``_place`` takes the number."""
    if not isinstance(piece.content, bytes):
        yield from enumerate(piece.content, 1)
        return
    try:
        text = piece.content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data {piece.path}: cannot be read as UTF-8 (byte {piece.start + error.start}: "
            f"{error.reason}); convert it"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert piece.path is not None
    if text_format(piece.path) == ".jsonl":
        yield from _records(piece, text, text_field)
    else:
        yield 1, text


def _place(piece: TextPiece, number: int) -> str:
    """Return the file and place of a piece's text, for an error message."""
    if piece.path is None:
        return f"Python's help topic {number}"
    if text_format(piece.path) == ".jsonl":
        return f"--data {piece.path}: line {lines_before(piece.path, piece.start) + number}"
    if text_format(piece.path) == ".parquet":
        return f"--data {piece.path}: text {number} of the rows from {piece.start} on"
    return f"--data {piece.path}: the text from byte {piece.start} on"


def _records(piece: TextPiece, content: str, text_field: str) -> Iterator[tuple[int, str | None]]:
    for number, line in enumerate(io.StringIO(content), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_field]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = 0
        if not isinstance(text, str | None):
            raise InputError(
                f"{_place(piece, number)} is not a JSON object with a text in {text_field!r}; "
                "fix the line or name the field with --text-field"
            )
        if text is not None and has_surrogates(text):
            raise InputError(
                f"{_place(piece, number)}: the text in {text_field!r} is not valid: it holds half "
                "of a pair of \\ud800 to \\udfff, which is no character; correct or remove it"
            )
        yield number, text


def encode(
    piece: TextPiece, text_field: str, encoding: TextEncoding = GPT2
) -> tuple[NDArray[np.uint32], int]:
    """Return a piece's token ids, uint32 [N], and how many of its records are null.

    Each document that is not empty ends with the encoding's EOS. Raises InputError, naming file and
    place, for text that cannot be read or encoded.
    """
    found: list[int] = []
    n_nulls = 0
    is_whole = not isinstance(piece.content, bytes)
    is_whole = is_whole or (piece.path is not None and text_format(piece.path) in STRUCTURED)
    parts = piece.is_first or is_whole, piece.is_last or is_whole
    for number, text in _numbered(piece, text_field):
        if text is None:
            n_nulls += 1
            continue
        with located(partial(_place, piece, number)):
            found += encoding.document_ids(text, *parts)
    return np.array(found, dtype=np.uint32), n_nulls
