"""Find the text files of --data, and hash their content and its encoding."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from llama_common.errors import InputError
from llama_common.help_topics import help_topics
from llama_common.notes import note

from ..common.torchrun import is_main_process
from ..tokenizer.encoding import GPT2, TextEncoding
from .folder_walk import Found, search
from .formats import ENDINGS, READABLE, STRUCTURED, ending, open_decompressed, text_format

# Part of every content key: change it with anything that changes the tokens of a text, or the
# windows that a run reads.
CACHE_VERSION = "2"
DATA = "--data"  # the flag that errors name


class Text(NamedTuple):
    """Text files, the records' field with the text, and a hash; no files = Python's help topics."""

    files: tuple[Path, ...]
    text_field: str
    key: str  # hash of the content and of the encoding
    stamps: tuple[tuple[int, int], ...]  # each file's size and modification time, before reading
    sizes: tuple[int, ...]  # of each file, in bytes, decompressed
    encoding: TextEncoding = GPT2


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the text files that files, folders and globs name, in order, each once.

    For folders and globs a line on stderr counts the files, and those passed over. Raises
    InputError for a name that stands for no text file.
    """
    files: dict[str, Path] = {}  # by real path: a file that several names lead to is read once
    searched: dict[str, Found] = {}
    for pattern in patterns:
        path = Path(pattern)
        if not pattern:
            raise InputError("--data '' names nothing; give a file, a folder or a glob")
        if os.path.isfile(pattern):  # False for a name that is too long
            if ending(path) not in ENDINGS:
                raise InputError(f"--data {path}: not one of {READABLE}; rename or convert it")
            files.setdefault(os.path.realpath(path), path)
            continue
        found = searched[pattern] = search(pattern)
        if not found.files:
            passed_over = found.describe_passed_over()
            raise InputError(
                f"--data {pattern}: no file found{passed_over and f' (passed over: {passed_over})'}"
                f"; give a file, a folder that holds {READABLE}, or a glob"
            )
        for real, path in found.files.items():
            files.setdefault(real, path)
    _note_searched(searched)
    return list(files.values())


def require_found(patterns: Sequence[str]) -> None:
    """Raise InputError as ``find_files`` does for names that a glance tells stand for no text.

    No folder is walked, which may take long.
    """
    for pattern in patterns:
        if not pattern or (not os.path.isdir(pattern) and not has_magic(pattern)):
            find_files([pattern])


def _note_searched(searched: dict[str, Found]) -> None:
    """Print how many files of folders and globs are read, on the main process."""
    if not searched or not is_main_process():
        return
    total = Found()
    for found in searched.values():
        total.files |= found.files
        total.passed_over += found.passed_over
        total.hidden += found.hidden
    name = next(iter(searched)) if len(searched) == 1 else f"{len(searched)} folders and globs"
    n, passed_over = len(total.files), total.describe_passed_over()
    note(
        f"--data {name}: {n} file{'s' * (n > 1)}"
        + (f"; passed over: {passed_over}" if passed_over else "")
    )


@contextmanager
def named_by(flag: str) -> Iterator[None]:
    """Let the errors of reading files, which name --data, name ``flag``."""
    try:
        yield
    except InputError as error:
        message = str(error)
        if flag == DATA or not message.startswith(f"{DATA} "):
            raise
        raise InputError(flag + message.removeprefix(DATA)) from None


def names_text(pattern: str) -> bool:
    """Return whether a value of --data is a file, a folder or a glob of text files."""
    return os.path.exists(pattern) or bool(search(pattern).files)  # False for a name too long


def identify(files: Sequence[Path], text_field: str, encoding: TextEncoding = GPT2) -> Text:
    """Return the files as a Text, with the hash of their bytes, formats and the encoding.

    Bytes are hashed decompressed: a text has the same key whether it is compressed or not, and a
    damaged file is an InputError before any of it is tokenised.
    """
    stamps, sizes = tuple(map(_stamp, files)), []
    digest = hashlib.sha256(f"{CACHE_VERSION} {encoding.sha256}".encode())
    if not files:
        for text in help_topics():
            digest.update(hashlib.sha256(text.encode()).digest())
    for path in files:
        name = text_format(path)
        digest.update(f"{name} {text_field if name in STRUCTURED else ''}".encode())
        with open_decompressed(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]
            sizes.append(file.tell())
    key = digest.hexdigest()[:32]
    return Text(tuple(files), text_field, key, stamps, tuple(sizes), encoding)


def require_unchanged(text: Text) -> None:
    """Raise InputError if a file has been written to since it was identified."""
    for path, stamp in zip(text.files, text.stamps, strict=True):
        if _stamp(path) != stamp:
            raise InputError(f"--data {path}: changed while it was read; run this again")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"--data {path}: cannot be read ({error})") from None
    return found.st_size, found.st_mtime_ns
