"""``llama-parity vectors``: list, copy and check the golden vectors."""

import importlib.util
import sys
from collections.abc import Sequence

COMMAND = "parity_tests.vectors.command"


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    if importlib.util.find_spec("parity_tests.vectors") is None:
        print("error: vectors: this installation has none", file=sys.stderr)
        return 2
    code: int = importlib.import_module(COMMAND).main(argv)
    return code
