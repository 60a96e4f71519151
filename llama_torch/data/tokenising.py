"""Tokenise the pieces of a text in worker processes, in order, with a progress bar."""

import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

from rich import progress as rich_progress
from rich.console import Console

from llama_common.errors import InputError

from . import documents
from .documents import TextPiece
from .shards import Ids
from .text_files import Text


def encoded(
    text: Text,
    pieces: Iterator[TextPiece],
    workers: int,
    advance: Callable[[float], object],
    lock: int | None = None,
) -> Generator[tuple[TextPiece, Ids, int], None, None]:
    """Yield every piece with its ids and count of nulls, in order.

    0 ``workers`` are one a core; about two pieces a worker are in memory. ``advance`` is told of
    bytes that are done. Workers close the file descriptor ``lock``.
    """
    n_pieces = 1 + sum(text.sizes) // documents.PIECE
    workers = min(workers or len(os.sched_getaffinity(0)), n_pieces)
    if workers == 1:
        for piece in pieces:
            yield piece, *documents.encode(piece, text.text_field, text.encoding)
            advance(piece.n_bytes)
        return
    text.encoding.load()  # before the fork, so that workers share its memory
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
            given = piece, text.text_field, text.encoding
            pending.append((piece, pool.submit(documents.encode, *given)))
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


def _begin_worker(parent: int, lock: int | None) -> None:
    """Ignore SIGINT, release the inherited lock, and exit when the parent process is gone."""
    if lock is not None:
        os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def progress_bar(text: Text) -> Iterator[Callable[[float], object]]:
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
