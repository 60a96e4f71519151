"""Runs of the conformance suite on a port's backends, each in a process with a time limit."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .environments import environment, installed, python_of
from .recorders import Recorder

PORTS = "parity_tests.ports"
ROOT = Path(__file__).parent.parent.parent
TO_FINISH = 30.0  # seconds that a run over its limit has to write its report


def run_recorder(
    recorder: Recorder, cache: Path, python: Path | None, profile: str
) -> dict[str, Any]:
    """Run the suite on all backends of a port; return its result as a JSON object.

    It runs with ``python``, or in the port's own environment. Raises InstallError where that cannot
    be made.
    """
    python = python or python_of(environment(recorder, cache))
    runs = {name: _run(recorder, name, python, profile) for name in recorder.objects}
    return {
        "schema": 1,
        "name": recorder.name,
        "title": recorder.title,
        "requires": [*recorder.requires, *recorder.npm],
        "versions": installed(python, recorder),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "profile": profile,
        "runs": runs,
    }


def _run(recorder: Recorder, backend: str, python: Path, profile: str) -> dict[str, Any]:
    """Run the suite on one backend; return its report, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        port = f"{PORTS}.{recorder.name}:{backend}"
        command = [
            *(str(python), "-m", "llama_parity", "test", port, "--no-basic"),
            *("--profile", profile, "--report", str(report)),
        ]
        begun = time.monotonic()
        output, is_over = _within(command, recorder, Path(folder))
        found: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1)}
        if is_over:
            found["over"] = f"the time limit of {recorder.minutes:g} minutes"
        if report.exists():
            document = json.loads(
                without_places(report.read_text(encoding="utf-8"), python, folder)
            )
            return found | _of_report(document)
        lines = [line for line in output.splitlines() if line.strip()]
        last = without_places((lines or ["no output"])[-1], python, folder)
        return found | {"error": last, "checks": []}


def without_places(text: str, python: Path, folder: str) -> str:
    """Return a report's text with files named by their places in the clone and the environment."""
    for place in (folder, str(python.parent.parent), str(ROOT)):
        text = text.replace(f"{place}/", "")
    return text


def _of_report(document: dict[str, Any]) -> dict[str, Any]:
    """Return what the grid keeps of a report."""
    (backend,) = document["backends"]
    return {
        "verdict": document["verdict"],
        "too_few": document["too_few"],
        "processor": document["machine"]["processors"],
        "dtypes": backend["dtypes"],
        "limits": backend["limits"],
        "compared": backend["compared"],
        "checks": backend["checks"],
    }


def _within(command: list[str], recorder: Recorder, folder: Path) -> tuple[str, bool]:
    """Run a command inside the port's time limit; return its output, and whether it was stopped.

    A run over its limit gets Ctrl-C first, upon which the suite writes what it has.
    """
    variables = {
        **os.environ,
        **recorder.variables,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "NODE_PATH": str(Path(command[0]).parent.parent / "node_modules"),
    }
    log = folder / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        is_over = False
        try:
            process.wait(recorder.minutes * 60)
        except subprocess.TimeoutExpired:
            is_over = True
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TO_FINISH)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return log.read_text(encoding="utf-8", errors="replace"), is_over
