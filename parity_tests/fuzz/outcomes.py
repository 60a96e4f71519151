"""Run a reader on a file, within bounds: it returns a value, or raises one InputError in one line.

Whatever else it does is an AssertionError: another exception, a message that names no file or
breaks out of its line, more memory than the files account for, seconds of computation, a file
opened elsewhere, one written, a process or a connection begun.
"""

import contextlib
import io
import resource
import signal
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama_common import notes
from llama_common.errors import InputError
from reference_np.config import InputError as OracleInputError

from .confinement import confined

SECONDS = 10  # of the processor, for files that take some milliseconds
MEMORY = 128 << 20  # bytes beside the files' own
LONGEST = 4_100  # characters of a message, with "note: "
ADDRESS_SPACE = 4 << 30  # more than was mapped before
# Categories of characters that end a line, move the cursor, turn the text or are half a character.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# The tools report both packages' errors.
ERRORS: dict[str, tuple[type[Exception], ...]] = {
    "llama_torch": (InputError,),
    "reference_np": (OracleInputError,),
    "tools": (InputError, OracleInputError),
}


class Outcome(NamedTuple):
    """A reader's value, or its refusal and what it printed on stderr."""

    value: Any
    refusal: str | None


class SlowError(BaseException):
    """The reader computed for SECONDS; no ``except Exception`` stops this."""


def outcome(
    read: Callable[[Path], Any],
    folder: Path,
    package: str = "llama_torch",
    writes: bool = False,
    names_flags: bool = False,
    memory: int = 8,
) -> Outcome:
    """Return the outcome of ``read(folder)``; raise AssertionError for a breach of its bounds.

    ``package`` is the one whose InputError counts. Of a file system the reader may use ``folder``
    alone, and write there only if ``writes``. If ``names_flags``, a refusal may name a flag in
    place of a file, as where two settings contradict each other. ``memory`` is the number of bytes
    that it may take for each of the files', beside MEMORY.
    """
    notes.note.cache_clear()
    said, value, refusal = io.StringIO(), None, None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with (
        bounded(MEMORY + memory * size),
        confined(folder, writes),
        contextlib.redirect_stderr(said),
    ):
        try:
            value = read(folder)
        except ERRORS[package] as error:
            refusal = str(error)
        except (MemoryError, SlowError) as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    for line in said.getvalue().splitlines():
        require_line(line)
    if refusal is not None:
        require_line(refusal)
        is_named = str(folder) in refusal or (names_flags and refusal.startswith("--"))
        assert is_named, f"names no file: {refusal}"
    return Outcome(value, refusal)


def require_line(text: str) -> None:
    """Assert that a message is one line of bounded length, without characters that act."""
    assert len(text) <= LONGEST, f"{len(text)} characters: {text[:300]!r}"
    acting = [c for c in text if unicodedata.category(c) in UNPRINTABLE]
    assert not acting, f"holds {acting[:4]!r}: {text[:300]!r}"


@contextlib.contextmanager
def bounded(memory: int) -> Iterator[None]:
    """Raise SlowError, MemoryError or AssertionError in a body of too many seconds or bytes."""

    def stop(*_: object) -> None:
        raise SlowError(f"over {SECONDS} s")

    handler = signal.signal(signal.SIGPROF, stop)
    before, limits = _peak(anew=True), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + ADDRESS_SPACE, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
        grown = _peak() - before
        assert grown <= memory, f"{grown >> 20} MiB, of {memory >> 20} MiB allowed"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)


def _mapped() -> int:
    """Return the bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _peak(anew: bool = False) -> int:
    """Return the most bytes of memory that this process has had, since the last call ``anew``.

    Where the kernel does not forget an earlier peak, growth below it is not seen.
    """
    if anew:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10
