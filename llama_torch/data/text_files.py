"""Find the text files of --data, and hash their content and its encoding."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..common.errors import InputError
from ..tokenizer.gpt2 import RANKS_SHA256

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
STRUCTURED = (".jsonl", ".parquet")
# Part of every content key: change it with anything that changes the tokens of a text, or the
# windows that a run reads.
CACHE_VERSION = "2"


class Text(NamedTuple):
    """Text files, the records' field with the text, and a hash; no files = Python's help topics."""

    files: tuple[Path, ...]
    text_field: str
    key: str  # hash of the content and of the encoding
    stamps: tuple[tuple[int, int], ...]  # each file's size and modification time, before reading


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Expand files, folders and globs to text files in sorted order, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if not pattern:
            raise InputError("--data '' names nothing; give a file, a folder or a glob")
        if path.is_dir():
            matches = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            raise InputError(
                f"--data {pattern}: no file found; give a file, a folder that holds "
                f"{' '.join(SUFFIXES)} files, or a glob"
            )
        found |= dict.fromkeys(matches)
    wrong = [str(path) for path in found if path.suffix not in SUFFIXES]
    if wrong:
        raise InputError(
            f"--data {wrong[0]}: not one of {' '.join(SUFFIXES)}; rename or convert it"
        )
    return list(found)


def identify(files: Sequence[Path], text_field: str) -> Text:
    """Return the files as a Text, with the hash of their bytes, formats and the encoding."""
    stamps = tuple(map(_stamp, files))
    digest = hashlib.sha256(f"{CACHE_VERSION} {RANKS_SHA256}".encode())
    if not files:
        for text in help_topics():
            digest.update(hashlib.sha256(text.encode()).digest())
    for path in files:
        digest.update(f"{path.suffix} {text_field if path.suffix in STRUCTURED else ''}".encode())
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"--data {path}: cannot be read ({error})") from None
    return Text(tuple(files), text_field, digest.hexdigest()[:32], stamps)


def require_unchanged(text: Text) -> None:
    """Raise InputError if a file has been written to since it was identified."""
    for path, stamp in zip(text.files, text.stamps, strict=True):
        if _stamp(path) != stamp:
            raise InputError(f"--data {path}: changed while it was read; run this again")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error})") from None
    return found.st_size, found.st_mtime_ns


def help_topics() -> Iterator[str]:
    """Yield the texts of Python's help topics, without indentation and runs of spaces.

    GPT-2 encodes each space as a token; the loss would be dominated by predictable indentation.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        lines = (" ".join(line.split()) for line in topics[name].splitlines())
        yield "\n".join(lines)
