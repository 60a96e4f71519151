"""One fault: a change of one place in the text of one file."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one file in llama_torch, as somebody porting or speeding it up would make it.

    ``old`` occurs once in the file. ``tests`` selects, as ``pytest -k`` does, the narrowest tests
    that should see the fault.
    """

    name: str
    file: str
    old: str
    new: str
    wrong: str
    tests: str
    only_gpu: bool = False  # what no interpreter and no recording of a graph shows
