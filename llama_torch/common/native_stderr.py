"""Leave out what a library in another language writes to stderr by itself."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STDERR = 2  # the descriptor, which such a library writes to

_lock = threading.Lock()
_inside = 0  # blocks that are being run, of all threads
_kept = -1  # a copy of the descriptor, meanwhile


@contextmanager
def silenced() -> Iterator[None]:
    """Discard what is written to the descriptor of stderr: Rust prints a panic as it begins."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _kept
    with _lock:
        _inside += 1
        if _inside > 1:
            return
        with suppress(OSError, AttributeError, ValueError):  # closed, or none
            sys.stderr.flush()
        with suppress(OSError):
            _kept = os.dup(STDERR)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, STDERR)
            os.close(null)


def _leave() -> None:
    global _inside, _kept
    with _lock:
        _inside -= 1
        if _inside or _kept < 0:
            return
        os.dup2(_kept, STDERR)
        os.close(_kept)
        _kept = -1
