"""The option --report: versions, machine, limits, and the verdict of every check, in one JSON file.

docs/conformance.md describes it. It is written when the run ends, whatever its end.
"""

import json
import math
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from llama_common.errors import InputError
from llama_common.files import require_writable, write_text
from reference_np.backend import dtypes_of, load, module_of
from reference_np.limits import limits_of

from ..conformance.basic import FINDINGS
from ..conformance.judge import JUDGE, Entry
from . import parity_report, processor
from .backend_option import USAGE, command_of, requested_backends
from .expectations import XFAILS

SCHEMA = 1
# Of a check's phases (setup, call, teardown) the worst verdict holds; "incomplete" is one whose
# call has not ended.
WORST = (
    "incomplete",
    "passed",
    "not covered",
    "skipped",
    "expected failure",
    "passed unexpectedly",
    "failed",
)
REASONS = 3  # of checks that were skipped, each once

# (id, backend) -> the check as far as its phases have ended.
checks: dict[tuple[str, str], dict[str, Any]] = {}
started = time.time()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("parity").addoption(
        "--report", metavar="FILE", help="write verdicts, errors and failures to a JSON file"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a file that cannot be written, before the tests run."""
    if name := config.getoption("report"):
        try:
            require_writable(Path(name).resolve(), f"--report {name}")
        except InputError as error:
            pytest.exit(str(error), USAGE)


def pytest_runtest_logreport(report: Any) -> None:
    """Take over what a process's report says of a conformance test."""
    found = getattr(report, "check", None)
    if found is None:
        return
    entry = {"verdict": "incomplete", "seconds": 0.0, **found}
    check = checks.setdefault((found["id"], found["backend"]), entry)
    check["seconds"] += report.duration
    verdict, reason = _verdict(report)
    if WORST.index(verdict) >= WORST.index(check["verdict"]):
        check["verdict"] = verdict
        if reason:
            check["reason"] = reason
    if "failure" in found:
        check["failure"] = found["failure"]


def _verdict(report: Any) -> tuple[str, str]:
    """Return the verdict of one phase, and the reason where it did not run as asked."""
    if hasattr(report, "wasxfail") and report.skipped:
        return "expected failure", str(report.wasxfail)
    if report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        why = why.removeprefix("Skipped: ")
        return ("not covered" if why.startswith("not covered") else "skipped"), why
    if report.failed and "failure" not in report.check:
        return "passed unexpectedly", str(report.longrepr)
    if report.failed:
        return "failed", ""
    return ("incomplete" if report.when == "setup" else "passed"), ""


@pytest.hookimpl(trylast=True)  # after the tables
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name each failed check on a line, and each that failed as expected, for llama-parity."""
    for sentence in stale_lines(config):
        terminalreporter.write_line(f"FAILED {sentence}")
    for sentence in nothing_compared(config):
        terminalreporter.write_line(sentence)
    for name, sentence in unexplained(config):
        terminalreporter.write_line(
            f"FAILED {name}: no check failed, but in the adapter's {sentence}"
        )
    for (name, backend), check in sorted(checks.items()) if command_of(config) else ():
        verdict, why = check["verdict"], check.get("reason", "")
        if verdict in ("failed", "passed unexpectedly"):
            why = check.get("failure", {}).get("message", why)
            terminalreporter.write_line(f"FAILED {backend} {name}: {why}")
        elif verdict == "expected failure":
            terminalreporter.write_line(f"{verdict}: {backend} {name}: {why}")


def unexplained(config: pytest.Config) -> list[tuple[str, str]]:
    """Return the name of each backend whose adapter was found wrong and no check red; and why.

    Only where all checks were to run.
    """
    red = {of for (_, of), check in checks.items() if check["verdict"] in WORST[-3:]}
    if config.getoption("keyword") or config.getoption("collectonly"):
        return []
    return [
        (name, f"check {finding.kind}: {finding.sentence}")
        for name in requested_backends(config)
        for finding in FINDINGS.get(name, ())[:1]
        if name not in red
    ]


def nothing_compared(config: pytest.Config) -> list[str]:
    """Return a line for each backend of --backend of which every check was skipped."""
    sentences, told = [], " ".join(parity_report.too_few(config))
    for name in requested_backends(config):
        found = [check for (_, of), check in checks.items() if of == name]
        if not {check["verdict"] for check in found} <= {"skipped", "not covered"}:
            continue
        reasons = list(dict.fromkeys(check["reason"] for check in found))
        if found and f"FAILED {name}:" not in told:
            why = "; ".join(reasons[:REASONS])
            more = f"; and {len(reasons) - REASONS} more" if len(reasons) > REASONS else ""
            sentences.append(f"FAILED {name}: nothing was compared ({why}{more})")
    return sentences


def stale_lines(config: pytest.Config) -> list[str]:
    """Return a sentence for each line of --xfails-file in whose checks nothing was compared.

    Such a line would hide a bug of what the implementation offers later. Only where all checks
    were to run.
    """
    sentences = []
    for line in config.stash[XFAILS] if parity_report.runs_all(config) else ():
        named = [check for (name, _), check in checks.items() if line.names(name)]
        if named and all(check["verdict"] == "not covered" for check in named):
            reasons = (re.sub("^not covered[:,] ", "", check["reason"]) for check in named)
            why = dict.fromkeys(reasons)
            sentences.append(
                f"{line.place}: {line.pattern} is an expected failure, and nothing was compared in "
                f"it ({'; '.join(why)}): remove the line"
            )
    return sentences


@pytest.hookimpl(trylast=True)  # after parity_report.py, which may fail the run
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    wrong = unexplained(config) or stale_lines(config) or nothing_compared(config)
    if not session.exitstatus and wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    name = config.getoption("report")
    if name and not hasattr(config, "workerinput"):
        names = requested_backends(config)
        command = command_of(config) or " ".join(["pytest", *config.invocation_params.args])
        machine = sorted(parity_report.computed_by) or [processor.describe()]
        document = as_document(names, int(session.exitstatus), command, machine)
        document["profile"] = hypothesis.settings.get_current_profile_name()
        document["too_few"] = [*parity_report.too_few(config), *nothing_compared(config)]
        document["stale_lines"] = stale_lines(config)
        write(Path(name), document)


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a report atomically."""
    write_text(path.resolve(), json.dumps(document, indent=1, allow_nan=False) + "\n")


def as_document(
    names: Sequence[str], exit_code: int, command: str, machine: Sequence[str]
) -> dict[str, Any]:
    """Return the report of a run on backends as a JSON object."""
    return {
        "schema": SCHEMA,
        "verdict": {0: "passed", 1: "failed"}.get(exit_code, "incomplete"),
        "command": command,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
        "versions": {
            "llama-parity": _installed("llama-parity"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "hypothesis": hypothesis.__version__,
            "pytest": pytest.__version__,
        },
        "machine": {"system": platform.platform(), "processors": list(machine)},
        "backends": [_backend(name) for name in names],
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _backend(name: str) -> dict[str, Any]:
    """Return all about one backend as a JSON object."""
    backend = load(name)
    module = module_of(name)
    package = sys.modules.get(module.__name__.partition(".")[0])
    version = getattr(module, "__version__", getattr(package, "__version__", None))
    found = [_check(check) for (_, of), check in sorted(checks.items()) if of == name]
    adapter = [{"kind": one.kind, "message": one.sentence} for one in FINDINGS.get(name, ())]
    return {
        "name": name,
        "version": None if version is None else str(version),
        "dtypes": list(dtypes_of(backend)),
        "limits": _as_json(limits_of(backend).declared()),
        "adapter": adapter if name in FINDINGS else None,
        "compared": sum(check["compared"] for check in found),
        "checks": found,
    }


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    """Return one check as a JSON object: its verdict, and what the judge recorded."""
    entry = JUDGE.entries.get(tuple(check["entry"]), Entry())
    share, documented = entry.share, entry.largest_documented
    return {
        "id": check["id"],
        "verdict": check["verdict"],
        "reason": check.get("reason"),
        "precision": entry.dtype or None,
        "compared": entry.covered,
        "worst_share": share if math.isfinite(share) else None,
        "worst_output": entry.name or None,
        "not_covered": dict(entry.not_covered),
        "outside_limits": list(entry.by_limit),
        "documented": dict(entry.documented),
        "largest_documented": documented if math.isfinite(documented) else None,
        "seconds": round(check["seconds"], 3),
        "failure": check.get("failure"),
    }


def _as_json(limits: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in limits.items()}
