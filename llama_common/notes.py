"""Lines on stderr about a choice that a file left open: no error, and said once."""

import functools
import sys

from .errors import printable


@functools.cache
def note(text: str) -> None:
    """Print ``text`` on one line of stderr, the first time that this process has it."""
    print(f"note: {printable(text)}", file=sys.stderr)
