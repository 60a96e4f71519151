"""``llama-parity COMMAND ...``: find the command and run it; nothing slow is imported for that."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from llama_common.interrupt import end_while_importing

HELP = """\
usage: llama-parity COMMAND [ARGUMENTS]

Judge an implementation of Llama by the NumPy specification.

  test MODULE:OBJECT    run the conformance suite on an implementation; or test FILE.py:OBJECT
  test --new FILE.py    write one to fill in
  compare CHECKPOINT    find the layer and the operation in which an implementation errs
  convert SRC DST       convert a checkpoint: Hugging Face's form, Meta's, GGUF (needs PyTorch)
  vectors               list, copy and check the golden vectors, for other languages

-h, --help shows this, and after a command its own; --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 for a difference, 2 for bad input."""
    end_while_importing()  # Ctrl-C is quiet; a command's own run handles it
    # SystemExit, so that SIGTERM too removes what is half-written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        return _print(HELP)
    if command in ("-V", "--version"):
        return _print(f"llama-parity {_version()}")
    if command in COMMANDS:
        return _hidden_here() or COMMANDS[command](rest)
    from llama_common.errors import printable
    from llama_common.nearest import did_you_mean

    meant = did_you_mean(command, COMMANDS) or f" give one of {', '.join(COMMANDS)}"
    print(f"error: {printable(command)}: no such command;{meant}", file=sys.stderr)
    return 2


def _hidden_here() -> int:
    """Return 2, and say why, where modules of the current folder are imported in place of others.

    Usually it is not searched for modules until that of an implementation is imported.
    """
    try:
        if os.getcwd() not in map(os.path.abspath, sys.path):
            return 0
    except FileNotFoundError:  # it was removed
        return 0
    from pathlib import Path

    from llama_common.errors import InputError
    from llama_common.hidden_modules import require_hides_none

    try:
        require_hides_none(Path.cwd())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print(text: str) -> int:
    """Print a text; a reader that goes away, as ``head`` does, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("llama-parity")
    except metadata.PackageNotFoundError:
        return "of a clone, not installed"


def _test(argv: Sequence[str]) -> int:
    from .test import main

    return main(argv)


def _compare(argv: Sequence[str]) -> int:
    from .. import compare
    from ..comparison.config import CompareConfig

    CompareConfig.command = "llama-parity compare"
    return _with_torch("compare: this", lambda: compare.main(argv))


def _convert(argv: Sequence[str]) -> int:
    from .. import convert

    convert.ConvertConfig.command = "llama-parity convert"
    return convert.main(argv)


def _vectors(argv: Sequence[str]) -> int:
    from .vectors import main

    return main(argv)


def _with_torch(who: str, run: Callable[[], int]) -> int:
    """Return what ``run`` does; one line and 2 where it needs PyTorch, which is not there."""
    try:
        return run()
    except ImportError as error:
        if getattr(error, "name", None) != "torch" and "llama-parity[torch]" not in str(error):
            raise
        print(
            f"error: {who} needs PyTorch: pip install 'llama-parity[torch]'",
            file=sys.stderr,
        )
        return 2


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "test": _test,
    "compare": _compare,
    "convert": _convert,
    "vectors": _vectors,
}
