"""From an argument list to a validated config, and from a user's mistake to one line."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from . import help_text
from .errors import InputError, VerificationError, printable
from .flags import require_known, reworded
from .interrupt import raise_or_end
from .settings import Settings, as_default, name_source

C = TypeVar("C")


def parse(config_class: type[C], argv: Sequence[str], settings: Settings | None = None) -> C:
    """Build ``config_class`` from flags; ``settings`` of files are what flags override.

    Raises InputError that names the flag, or the file whose value is wrong. ``--help`` and
    ``--help-all`` print and exit.
    """
    complaint, settings = io.StringIO(), settings or {}
    default: dict[str, Any] = {"default": as_default(config_class, settings)} if settings else {}
    if help_text.is_asked(argv):
        everything = "--help-all" in argv
        print(help_text.render(config_class, default.get("default"), everything))
        sys.exit()
    require_known(argv, config_class)
    try:
        with contextlib.redirect_stderr(complaint):
            config: C = tyro.cli(
                config_class,
                args=argv,
                config=(tyro.conf.OmitArgPrefixes,),
                **default,
            )
            return config
    except SystemExit as exit_:
        if not exit_.code:
            raise
        message = name_source(_one_line(complaint.getvalue()), settings, argv)
        message = reworded(message, config_class, argv)
        end = "" if message.endswith("?") else ";"
        raise InputError(f"{message}{end} see --help") from None


def early_flags(argv: Sequence[str], config_class: type[Any]) -> argparse.Namespace:
    """Read the flags first that the others' defaults depend on.

    ``config``, ``out``, ``init_from`` and ``steps`` are None where they are not given, and
    ``resume`` is False where help is asked for. Raises InputError for a word that looks like a flag
    and is none.
    """
    require_known(argv, config_class)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    # tyro takes underscores as well.
    for names in (("--config",), ("--out",), ("--init-from", "--init_from"), ("--steps",)):
        # A forgotten value is left for tyro to report.
        parser.add_argument(*names, nargs="?", default=None, const="")
    parser.add_argument("--resume", action="store_true")
    try:
        early = parser.parse_known_args(list(argv))[0]
        early.resume = early.resume and not help_text.is_asked(argv)
        return early
    except argparse.ArgumentError as error:
        raise InputError(f"{str(error).removeprefix('argument ')}; see --help") from None


def run(main: Callable[[], int]) -> int:
    """Call ``main``; an InputError becomes one line on stderr and exit code 2.

    A VerificationError is 1. What the operating system refuses (a full disk, a name too long) is
    2 as well. Ctrl-C is 130, and a reader of the output that went away 141, as shells count them.
    """
    try:
        with _interruptible():
            return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (VerificationError, InputError, OSError) as error:
        complain(error)
        return 1 if isinstance(error, VerificationError) else 2
    except BaseException as error:
        # A library in Rust that panics on a file; the class has no public name.
        if type(error).__name__ != "PanicException":
            raise
        complain(f"a library failed on a file that it was given ({error})")
        return 2


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, where it had its default action; put that back after.

    So a second Ctrl-C, or one while Python exits, ends the process at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, raise_or_end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def complain(error: Exception | str) -> None:
    """Print an error on one line of stderr, whatever the names in it hold."""
    print(f"error: {printable(str(error))}", file=sys.stderr)


def _one_line(box: str) -> str:
    """Take the message out of tyro's framed, wrapped complaint."""
    # The frame is drawn in ASCII where the terminal's encoding has no lines.
    lines = [re.sub(r"[╭╮╰╯│─]|^[|+]|[|+]$|-{3,}", "", line).strip() for line in box.splitlines()]
    text = []
    for line in lines[1:]:
        if line.startswith(("Argument helptext", "For full helptext", "Perhaps you meant")):
            break
        text.append(line)
    message = " ".join(" ".join(text).split()) or " ".join(" ".join(lines).split())
    return re.sub(r"^Error parsing \w+: (?=--)", "", message)
