"""Say how far a long reading is, on stderr: a line now and then, none in a short one."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

FIRST_LINE, BETWEEN_LINES = 5.0, 10.0  # seconds


def told(items: Iterable[T], doing: str) -> Iterator[T]:
    """Yield the items; say how many there were, and of how many where ``items`` has a length.

    doing  what is done with them, in words that a number follows: "pairs tokenised".
    """
    began = time.monotonic()
    due = began + FIRST_LINE
    whole = f" of {len(items):,}" if isinstance(items, Sized) else ""
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due:
            line = f"{doing}: {number:,}{whole} ({now - began:.0f} s)"
            print(line, file=sys.stderr, flush=True)
            due = now + BETWEEN_LINES
