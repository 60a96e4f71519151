"""The options --check, --xfails-file and --skips-file: conformance tests by their short ids.

An id is the test's name and its parameters without the backend: ``test_logits_in[float32]``. In a
pattern ``*`` stands for any characters and ``?`` for one. A file has one id or pattern a line;
what follows a ``#`` is the reason, which may be left out. An expected failure that passes fails the
run, as does one in which nothing was compared (run_report.py).
"""

import difflib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from reference_np.config import InputError

from ..conformance.scope import check_ids
from .backend_option import CONFORMANCE, USAGE, check_id, is_conformance


class Expectation(NamedTuple):
    """One line of a file, or one --check: the checks that it names, and why."""

    pattern: str
    reason: str
    place: str  # the file and its line, or the flag

    def names(self, check: str) -> bool:
        """Return whether the pattern names a check."""
        words = (re.escape(part) for part in re.split(r"([*?])", self.pattern))
        regex = "".join({r"\*": ".*", r"\?": "."}.get(word, word) for word in words)
        return re.fullmatch(regex, check) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption(
        "--check",
        action="append",
        default=[],
        metavar="ID",
        help="run this check alone (repeatable): an id as test_logits_in[float32], or a pattern",
    )
    group.addoption(
        "--xfails-file",
        metavar="FILE",
        help="ids of checks that are to fail, one a line, with # REASON if you like; one that "
        "passes, or compares nothing, is an error",
    )
    group.addoption(
        "--skips-file", metavar="FILE", help="ids of checks not to run, in the same form"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the files; end the run with one line where one names no check."""
    try:
        config.stash[CHECKS] = [
            Expectation(_short(word), "", "--check") for word in config.getoption("check")
        ]
        config.stash[XFAILS] = _read("--xfails-file", config.getoption("xfails_file"))
        config.stash[SKIPS] = _read("--skips-file", config.getoption("skips_file"))
        given = [*config.stash[CHECKS], *config.stash[XFAILS], *config.stash[SKIPS]]
        if given:
            _require_known(given)
    except InputError as error:
        pytest.exit(str(error), USAGE)


CHECKS, XFAILS, SKIPS = (pytest.StashKey[Sequence[Expectation]]() for _ in range(3))


def _read(flag: str, path: str | None) -> list[Expectation]:
    """Return the lines of a file; InputError where it cannot be read."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise InputError(f"{flag} {path}: cannot be read ({why})") from None
    found = []
    for number, line in enumerate(lines, 1):
        pattern, _, reason = line.partition("#")
        if pattern.strip():
            found.append(Expectation(_short(pattern), reason.strip(), f"{path}:{number}"))
    return found


def _short(text: str) -> str:
    """Return an id without the file's name before it."""
    return text.strip().rpartition("::")[2]


def known_checks() -> list[str]:
    """Return the ids of all conformance tests; this process need not collect them."""
    package = check_ids.__module__.rpartition(".")[0]
    files = sorted(CONFORMANCE.glob("test_*.py"))
    modules = [importlib.import_module(f"{package}.{file.stem}") for file in files]
    return [check for module in modules for check in check_ids(module)]


def _require_known(given: Sequence[Expectation]) -> None:
    known = known_checks()
    for one in given:
        if not any(map(one.names, known)):
            near = difflib.get_close_matches(one.pattern, known, 2)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            meant = meant or "; llama-parity test --list prints the ids of all"
            raise InputError(f"{one.place}: {one.pattern} names no check{meant}")


@pytest.hookimpl(tryfirst=True)  # before -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the checks that the files name; leave out those that --check does not."""
    checks = {item: check_id(item) for item in items if is_conformance(item)}
    if chosen := config.stash[CHECKS]:
        kept = [item for item, check in checks.items() if _first(chosen, check)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    for item, check in checks.items():
        if expected := _first(config.stash[XFAILS], check):
            item.add_marker(pytest.mark.xfail(reason=_why(expected), strict=True))
        if skipped := _first(config.stash[SKIPS], check):
            item.add_marker(pytest.mark.skip(reason=_why(skipped)))


def _first(among: Sequence[Expectation], check: str) -> Expectation | None:
    return next((one for one in among if one.names(check)), None)


def _why(expectation: Expectation) -> str:
    return expectation.reason or f"named in {expectation.place}"


def expected_failure(item: pytest.Item) -> Expectation | None:
    """Return the line of --xfails-file that names a check; None if there is none."""
    return _first(item.config.stash[XFAILS], check_id(item)) if is_conformance(item) else None
