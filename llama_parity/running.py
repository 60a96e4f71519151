"""Run a command: errors of use, the specification's too, are one line and exit code 2."""

import sys
from collections.abc import Callable, Sequence

from llama_common import cli
from reference_np.config import InputError


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a command on its arguments, the process's where they are None; return the exit code."""
    try:
        return cli.run(lambda: command(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        cli.complain(error)
        return 2
