"""The judge of Llamas: compare an implementation with the specification, and convert its files."""

import os
import sys


def _leave_out_current_folder() -> None:
    """Take off the path what ``python -m`` puts first, where a numpy.py would be imported as NumPy.

    It is put back for an implementation's module. In a clone these packages lie there.
    """
    first = sys.path[0] if sys.argv[:1] == ["-m"] and sys.path else os.devnull
    packages = os.path.dirname(os.path.dirname(__file__))
    if first != packages and os.path.isdir(first) and os.path.samefile(first, os.curdir):
        del sys.path[0]


_leave_out_current_folder()
