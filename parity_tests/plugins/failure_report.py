"""The report of a failing example: ten lines for a conformance test, and how to run it again."""

import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conformance import calls
from ..conformance.calls import ParityError, last_call
from .backend_option import is_conformance, requested_backends

FRAMES = 3  # of the implementation's own, where it raised an error
PRINTED = 3  # lines that it printed last, each once: it prints them for every example


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Shorten a conformance test's report; end any with one line that runs the example again."""
    report = yield
    if call.excinfo is None:
        return report
    error, again = call.excinfo.value, _again(item, call.excinfo.value)
    lines = _lines(error) if is_conformance(item) and report.failed else []
    if lines and item.config.getoption("tbstyle") == "auto":
        report.longrepr = "\n".join([*lines, *(f"again      {line}" for line in again)])
        report.sections = [(title, _brief(text)) for title, text in report.sections]
    else:
        report.sections += [("run this example again", line) for line in again]
    return report


def _lines(error: BaseException) -> list[str]:
    """Return what failed and on which example; nothing for an error that is not the backend's."""
    if isinstance(error, ParityError):
        equal = error.resembling()
        same = [f"equals     the known bug {bug}" for bug in equal[:2]]
        details = [*error.details, *_example(), *same]
        return [error.sentence, *details]
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if Path(frame.filename) == Path(calls.__file__)]
    if not inside or inside[-1] == len(frames) - 1 or not isinstance(error, Exception):
        return []
    own = frames[inside[-1] + 1 :]
    places = [f"at         {at.filename}:{at.lineno} in {at.name}: {at.line}" for at in own]
    shown = places if len(places) <= FRAMES else [places[0], *places[1 - FRAMES :]]
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return [message, *shown, *_example()]


def _example() -> list[str]:
    """Return the config and the call of the example that ran last."""
    return [f"{name:<10} {text}" for name, text in zip(("config", "call"), last_call, strict=False)]


def _brief(text: str) -> str:
    """Return the last lines of what an implementation printed, and the number of the others."""
    lines = list(dict.fromkeys(text.splitlines()))
    left = len(lines) - PRINTED
    first = [f"... {left} other lines (--show-capture=no leaves out all)"] if left > 0 else []
    return "\n".join([*first, *lines[-PRINTED:]])


def _again(item: pytest.Item, error: BaseException) -> list[str]:
    """Return the command lines that run the failing examples again."""
    lines = []
    path, _, name = item.nodeid.partition("::")
    test = f"{os.path.relpath(item.config.rootpath / path)}::{name}"
    for blob in re.findall(r"@reproduce_failure\('[^']*', b'([^']*)'\)", " ".join(_notes(error))):
        line = f"pytest '{test}' --reproduce {blob}"
        line += "".join(f" --backend {name}" for name in requested_backends(item.config))
        lines.append(line + (" --poison" if item.config.getoption("poison") else ""))
    return lines


def _notes(error: BaseException) -> Iterator[str]:
    """Yield the notes of an error, or of each error of a group."""
    yield from getattr(error, "__notes__", ())
    for inner in getattr(error, "exceptions", ()):
        yield from _notes(inner)
