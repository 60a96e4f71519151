"""The report of a failing example: ten lines for a conformance test, and how to run it again."""

import os
import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..conformance import calls
from ..conformance.calls import ParityError, last_call
from ..conformance.description import describe_error
from .backend_option import (
    backend_name,
    check_id,
    command_of,
    is_conformance,
    requested_backends,
)
from .expectations import expected_failure
from .parity_report import entry_key

FRAMES = 3  # of the implementation's own, where it raised an error
PRINTED = 3  # lines that it printed last, each once: it prints them for every example


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Shorten a conformance test's report; end any with one line that runs the example again."""
    report = yield
    of_suite = is_conformance(item)
    if of_suite:  # for run_report.py, in another process where there are several
        report.check = {"id": check_id(item), "backend": backend_name(item)}
        report.check["entry"] = list(entry_key(item))
    if call.excinfo is None:
        if report.failed and (line := expected_failure(item)):
            report.longrepr = (
                f"{check_id(item)} passes, and {line.place} has it as an expected failure"
                f"{f' ({line.reason})' if line.reason else ''}: remove the line"
            )
        return report
    error, again = call.excinfo.value, _again(item, call.excinfo.value)
    lines = _lines(error) if of_suite and report.failed else []
    if of_suite and report.failed:
        report.check["failure"] = _fields(lines or [str(error)], again)
    if lines and item.config.getoption("tbstyle") == "auto":
        report.longrepr = "\n".join([*lines, *(f"again      {line}" for line in again)])
        report.sections = [(title, _brief(text)) for title, text in report.sections]
    else:
        report.sections += [("run this example again", line) for line in again]
    return report


def _fields(lines: Sequence[str], again: Sequence[str]) -> dict[str, Any]:
    """Return a failure as a JSON object: its sentence, and its labelled lines by label."""
    first, *rest = lines
    fields: dict[str, Any] = {"message": first, "equals": [], "at": [], "again": list(again)}
    for line in rest:
        label, text = line[:10].strip(), line[10:].strip()
        if isinstance(fields.get(label), list):
            fields[label].append(text)
        else:
            fields[label] = text
    return fields


def _lines(error: BaseException) -> list[str]:
    """Return what failed and on which example; nothing for an error that is not the backend's."""
    if isinstance(error, ParityError):
        equal = error.resembling()
        same = [f"equals     the known bug {bug}" for bug in equal[:2]]
        places = _places(error.__cause__) if error.__cause__ else []
        return [error.sentence, *error.details, *places, *_example(), *same]
    places = _places(error)
    if not places or not isinstance(error, Exception):
        return []
    return [describe_error(error), *places, *_example()]


def _places(error: BaseException) -> list[str]:
    """Return the lines of the implementation that raised an error; none for one of the suite's."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if Path(frame.filename) == Path(calls.__file__)]
    own = frames[inside[-1] + 1 :] if inside else []
    places = [f"at         {at.filename}:{at.lineno} in {at.name}: {at.line}" for at in own]
    return places if len(places) <= FRAMES else [places[0], *places[1 - FRAMES :]]


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
    of_command = is_conformance(item) and bool(command_of(item.config))
    if of_command:
        port, check = map(shlex.quote, (backend_name(item), check_id(item)))
        test, chosen = f"llama-parity test {port} --check {check}", ""
    else:
        test, chosen = _of_pytest(item)
    for blob in re.findall(r"@reproduce_failure\('[^']*', b'([^']*)'\)", " ".join(_notes(error))):
        line = f"{test} --reproduce {blob}{chosen}"
        lines.append(line + (" --poison" if item.config.getoption("poison") else ""))
    # A test of fixed examples has no blob.
    return lines or ([test] if of_command else [])


def _of_pytest(item: pytest.Item) -> tuple[str, str]:
    """Return the command line of pytest for a test, and its --backend."""
    path, _, name = item.nodeid.partition("::")
    test = f"{os.path.relpath(item.config.rootpath / path)}::{name}"
    chosen = "".join(f" --backend {shlex.quote(name)}" for name in requested_backends(item.config))
    return f"pytest '{test}'", chosen


def _notes(error: BaseException) -> Iterator[str]:
    """Yield the notes of an error, or of each error of a group."""
    yield from getattr(error, "__notes__", ())
    for inner in getattr(error, "exceptions", ()):
        yield from _notes(inner)
