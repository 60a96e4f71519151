"""Show how far a comparison is: bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape

from llama_common.errors import printable

FIRST_LINE, BETWEEN_LINES = 5.0, 10.0  # seconds

Start = Callable[[str, int], Callable[[], None]]  # (title, steps) -> a function for a step done


@contextmanager
def progress() -> Iterator[Start]:
    """Show progress on standard error, bars with their ETA where it is a terminal.

    Yields a function (title, steps) that adds a bar and returns a function to call after a step.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    bars = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("ETA"),
        rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
    )

    def start(title: str, steps: int) -> Callable[[], None]:
        task = bars.add_task(escape(printable(title)), total=steps)
        return lambda: bars.advance(task)

    with bars:
        yield start


def _lines() -> Start:
    """Return a function that prints a line on standard error now and then, none in a short run."""
    began = time.monotonic()
    due = began + FIRST_LINE

    def say(text: str) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            print(f"{text} ({now - began:.0f} s)", file=sys.stderr, flush=True)
            due = now + BETWEEN_LINES

    def start(title: str, steps: int) -> Callable[[], None]:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            say(f"{printable(title)}: {done} of {steps}")

        say(f"{printable(title)}: 0 of {steps}")
        return advance

    return start
