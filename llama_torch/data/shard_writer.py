"""Tokenise text into token shards, in parallel, resuming after a kill."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llama_common.errors import InputError
from llama_common.files import atomic_write, open_lock, require_name, try_lock

from ..common.state_file import write_state
from . import documents
from .documents import Nulls
from .shard_progress import (
    Encoded,
    Progress,
    another_text,
    continued,
    require_end,
    resume,
    write_progress,
)
from .shards import (
    DTYPES,
    FORMAT,
    INDEX_FILE,
    LOCK_FILE,
    PROGRESS_FILE,
    VERSION,
    Ids,
    Index,
    Shard,
    TokenShards,
    shard_name,
)
from .text_files import Text, require_unchanged
from .tokenising import encoded, progress_bar

SHARD_TOKENS = 1 << 26


def prepare(
    text: Text, folder: Path, workers: int = 0, shard_tokens: int = SHARD_TOKENS
) -> TokenShards:
    """Tokenise a text into the token shards of ``folder``, or resume that; 0 workers = one a core.

    The files do not depend on the number of workers or of kills. A second process that prepares
    the same folder waits for the first. Raises InputError for a folder that holds another text or
    cannot be written, and for text that cannot be read.
    """
    require_name(folder)
    try:
        if not (folder / INDEX_FILE).is_file() or (folder / PROGRESS_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder) as lock:
                if not (folder / INDEX_FILE).is_file():
                    _fill(folder, text, workers, shard_tokens, lock)
                (folder / PROGRESS_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error}); choose another folder (a trainer's is below "
            "--cache-dir), or make room and run this again"
        ) from None
    shards = TokenShards(folder)
    index = shards.index
    found = index.key, index.encoding, index.shard_tokens
    if found != (text.key, text.encoding.sha256, shard_tokens):
        raise another_text(folder)
    Nulls(index.nulls, index.first_null_file).print(text.files)
    return shards


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, waiting for another process's; yield its file descriptor."""
    handle = open_lock(folder / LOCK_FILE)
    try:
        if not try_lock(handle):
            print(f"waiting for another process that tokenises into {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _fill(folder: Path, text: Text, workers: int, shard_tokens: int, lock: int) -> None:
    dtype = "uint16" if text.encoding.tokenizer.n_ids <= 1 << 16 else "uint32"
    done = resume(folder, text, shard_tokens, DTYPES[dtype])
    pieces = documents.pieces(text.files, text.text_field, done.file, done.start)
    with (
        progress_bar(text) as advance,
        closing(encoded(text, pieces, workers, advance, lock)) as parts,
    ):
        advance(sum(text.sizes[: done.file]) + done.start)
        stream = _Stream(continued(parts, folder, done, DTYPES[dtype]), done)
        while stream.more():
            require_end(folder, done)
            path = folder / shard_name(len(done.shards))
            shard, highest = _write_shard(path, stream, shard_tokens, DTYPES[dtype])
            done.shards, done.highest = (*done.shards, shard), max(done.highest, highest)
            done.file, done.start, done.skip = *stream.place, stream.used
            done.nulls, done.first_null_file = stream.nulls_before
            write_progress(folder, done)
    try:
        require_unchanged(text)
    except InputError:
        (folder / PROGRESS_FILE).unlink()  # these tokens are of neither text
        raise
    total = sum(shard.tokens for shard in done.shards)
    index = Index(
        *(dtype, text.encoding.sha256, text.key, shard_tokens, total, done.highest, done.shards),
        *stream.nulls,
    )
    record = {"format": FORMAT, "version": VERSION, **asdict(index)}
    write_state(folder / INDEX_FILE, record, indent=1)


def _write_shard(path: Path, stream: "_Stream", n: int, dtype: str) -> tuple[Shard, int]:
    """Write the next ``n`` ids, or the remaining ones; return the shard and its highest id."""
    digest, highest, tokens = hashlib.sha256(), -1, 0

    def write(temporary: Path) -> None:
        nonlocal highest, tokens
        with temporary.open("wb") as file:
            for part in stream.take(n):
                data = part.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                highest, tokens = max(highest, int(part.max())), tokens + len(part)

    atomic_write(path, write)
    return Shard(path.name, tokens, digest.hexdigest()), highest


class _Stream:
    """The concatenated ids of pieces, and the position in the current piece."""

    def __init__(self, encoded: Iterator[Encoded], done: Progress) -> None:
        self.encoded, self.skip = encoded, done.skip
        self.nulls = self.nulls_before = Nulls(done.nulls, done.first_null_file)
        self.rest: Ids = np.zeros(0, np.uint32)
        self.place, self.used = (0, 0), 0

    def more(self) -> bool:
        """Return whether ids remain."""
        while not len(self.rest):
            found = next(self.encoded, None)
            if found is None:
                return False
            piece, ids, n_nulls = found
            self.nulls_before, self.nulls = self.nulls, self.nulls.plus(n_nulls, piece.file)
            self.place, self.used, self.skip = (piece.file, piece.start), self.skip, 0
            self.rest = ids[self.used :]
        return True

    def take(self, n: int) -> Iterator[Ids]:
        """Yield the next ``n`` ids, or the remaining ones, in parts."""
        while n and self.more():
            part, self.rest = self.rest[:n], self.rest[n:]
            self.used += len(part)
            n -= len(part)
            yield part
