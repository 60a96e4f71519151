"""Commands run in this process, as the tests of several files do."""

from tools import convert


def run_convert(*argv: object) -> None:
    """Run convert.py, which must succeed."""
    assert convert.main([str(word) for word in argv]) == 0
