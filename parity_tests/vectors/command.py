"""List, copy and check the golden vectors: ``llama-parity vectors``.

Needs NumPy and safetensors, no PyTorch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import llama_common.errors
from reference_np.config import InputError

from .check import VECTORS, check, copy_vectors, exit_code, list_cases, report

PROGRAM = "llama-parity vectors"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"vectors: {message}; see {PROGRAM} --help")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = _Parser(prog=PROGRAM, description="Small cases as files (docs/vectors.md).")
    actions = found.add_subparsers(dest="action", required=True, metavar="list|copy|check")
    actions.add_parser("list", help="print each case's name, what it needs and what it tests")
    copy = actions.add_parser("copy", help="copy the files and the readers into a new folder")
    copy.add_argument("folder", type=Path)
    checked = actions.add_parser(
        "check", help="compare a port's traces, CASE.safetensors each, with the expected ones"
    )
    checked.add_argument("folder", type=Path)
    checked.add_argument(
        "--float32-angles",
        action="store_true",
        help="allow for the error of angles that are products in float32",
    )
    for one in (copy, checked, actions.choices["list"]):
        one.add_argument("--vectors", type=Path, default=VECTORS, help="other vectors than these")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command line; return 0, 1 where a case failed, 2 for a mistake of the user's."""
    try:
        return _run(parser().parse_args(argv))
    except (InputError, llama_common.errors.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if given.action == "list":
        print("\n".join(list_cases(given.vectors)))
        return 0
    if given.action == "copy":
        count = copy_vectors(given.folder, given.vectors)
        print(f"{count} cases copied to {given.folder}; begin with those named basic-")
        return 0
    verdicts = check(given.folder, given.float32_angles, given.vectors)
    print("\n".join(report(verdicts)))
    return exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
