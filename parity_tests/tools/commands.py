"""Commands run in this process, as the tests of several files do."""

from pathlib import Path
from typing import NamedTuple

import tiktoken

from llama_parity import convert
from llama_torch import TextModel


class Converted(NamedTuple):
    """A checkpoint before and after, and tiktoken's encoding of its ranks."""

    source: Path
    folder: Path
    tiktoken: tiktoken.Encoding
    model: TextModel


def run_convert(*argv: object) -> None:
    """Run convert.py, which must succeed."""
    assert convert.main([str(word) for word in argv]) == 0
