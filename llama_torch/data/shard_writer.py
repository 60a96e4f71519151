"""Tokenise text into token shards, in parallel, resuming after a kill."""

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress as rich_progress
from rich.console import Console

from ..common.errors import InputError
from ..common.files import atomic_write, open_lock, read_json, try_lock, write_text
from ..tokenizer.gpt2 import RANKS_SHA256, gpt2
from . import documents
from .documents import Nulls, TextPiece
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
    require_size,
    shard_name,
)
from .text_files import Text, require_unchanged

SHARD_TOKENS = 1 << 26


def prepare(
    text: Text, folder: Path, workers: int = 0, shard_tokens: int = SHARD_TOKENS
) -> TokenShards:
    """Tokenise a text into the token shards of ``folder``, or resume that; 0 workers = one a core.

    The files do not depend on the number of workers or of kills. A second process that prepares
    the same folder waits for the first. Raises InputError for a folder that holds another text or
    cannot be written, and for text that cannot be read.
    """
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
    if (shards.index.key, shards.index.shard_tokens) != (text.key, shard_tokens):
        raise _another_text(folder)
    Nulls(shards.index.nulls, shards.index.first_null_file).print(text.files)
    return shards


def _another_text(folder: Path) -> InputError:
    return InputError(
        f"{folder} holds the tokens of another text, or in shards of another size; choose "
        "another folder, or delete it"
    )


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


@dataclass
class _Done:
    """The fields of progress.json: the shards written, and where the next one begins."""

    key: str
    shard_tokens: int
    highest: int = -1
    file: int = 0  # with start: the piece that holds the next shard's first token
    start: int = 0
    skip: int = 0  # tokens of that piece already written
    nulls: int = 0  # records left out before that piece
    first_null_file: int = -1  # of the files with one, the first; -1 = none
    shards: tuple[Shard, ...] = ()


def _fill(folder: Path, text: Text, workers: int, shard_tokens: int, lock: int) -> None:
    dtype = "uint16" if gpt2().n_vocab <= 1 << 16 else "uint32"
    done = _resume(folder, _Done(text.key, shard_tokens), np.dtype(DTYPES[dtype]).itemsize)
    pieces = documents.pieces(text.files, text.text_field, done.file, done.start)
    with _progress(text) as advance, closing(_encoded(text, pieces, workers, lock, advance)) as ids:
        advance(sum(text.sizes[: done.file]) + done.start)
        stream = _Stream(ids, done)
        while stream.more():
            path = folder / shard_name(len(done.shards))
            shard, highest = _write_shard(path, stream, shard_tokens, DTYPES[dtype])
            done.shards, done.highest = (*done.shards, shard), max(done.highest, highest)
            done.file, done.start, done.skip = *stream.place, stream.used
            done.nulls, done.first_null_file = stream.nulls_before
            write_text(folder / PROGRESS_FILE, json.dumps(asdict(done)))
    try:
        require_unchanged(text)
    except InputError:
        (folder / PROGRESS_FILE).unlink()  # these tokens are of neither text
        raise
    total = sum(shard.tokens for shard in done.shards)
    index = Index(
        *(dtype, RANKS_SHA256, text.key, shard_tokens, total, done.highest, done.shards),
        *stream.nulls,
    )
    record = {"format": FORMAT, "version": VERSION, **asdict(index)}
    write_text(folder / INDEX_FILE, json.dumps(record, indent=1) + "\n")


def _resume(folder: Path, fresh: _Done, width: int) -> _Done:
    path = folder / PROGRESS_FILE
    if not path.is_file():
        if (folder / shard_name(0)).exists():
            raise InputError(
                f"{folder} holds shards without an index; delete it, or choose another"
            )
        write_text(path, json.dumps(asdict(fresh)))
        return fresh
    try:
        found = read_json(path)
        done = _Done(**found | {"shards": tuple(Shard(**shard) for shard in found["shards"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete {folder}") from None
    if (done.key, done.shard_tokens) != (fresh.key, fresh.shard_tokens):
        raise _another_text(folder)
    for shard in done.shards:
        require_size(folder, shard, width)
    return done


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

    def __init__(self, encoded: Iterator[tuple[TextPiece, Ids, int]], done: _Done) -> None:
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


def _encoded(
    text: Text, pieces: Iterator[TextPiece], workers: int, lock: int, advance: Any
) -> Generator[tuple[TextPiece, Ids, int], None, None]:
    """Yield every piece with its ids and count of nulls, in order.

    About two pieces a worker are in memory.
    """
    n_pieces = 1 + sum(text.sizes) // documents.PIECE
    workers = min(workers or len(os.sched_getaffinity(0)), n_pieces)
    if workers == 1:
        for piece in pieces:
            yield piece, *documents.encode(piece, text.text_field)
            advance(piece.n_bytes)
        return
    gpt2()  # loaded before the fork, so that workers share its memory
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_begin_worker, initargs=(os.getpid(), lock)
    )
    pending: deque[tuple[TextPiece, Future[tuple[Ids, int]]]] = deque()

    def first() -> tuple[TextPiece, Ids, int]:
        piece, future = pending.popleft()
        ids, n_nulls = future.result()
        advance(piece.n_bytes)
        return piece._replace(content=()), ids, n_nulls

    try:
        with warnings.catch_warnings():
            # Python warns of forking a process with threads; workers use no lock of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(int)
        for piece in pieces:
            pending.append((piece, pool.submit(documents.encode, piece, text.text_field)))
            if len(pending) > 2 * workers:
                yield first()
        while pending:
            yield first()
    except BrokenProcessPool:
        raise InputError(
            "a process that tokenises was killed (out of memory?); what is done is kept: run "
            "this again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int, lock: int) -> None:
    """Ignore SIGINT, release the inherited lock, and exit when the parent process is gone."""
    os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _progress(text: Text) -> Iterator[Any]:
    """Show a progress bar on a terminal; yield the function that advances it by n bytes."""
    console = Console(stderr=True)
    with rich_progress.Progress(
        rich_progress.TextColumn("tokenising"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=sum(text.sizes))
        yield partial(bar.advance, task)
