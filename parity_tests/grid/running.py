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

from llama_common.errors import printable

from .environments import InstallError, environment, installed, python_of
from .recorders import Recorder

PORTS = "parity_tests.ports"
ROOT = Path(__file__).parent.parent.parent
TO_FINISH = 30.0  # seconds that a run over its limit has to write its report


def run_recorder(
    recorder: Recorder, cache: Path, python: Path | None, profile: str
) -> dict[str, Any]:
    """Run the suite on all backends of a port; return its result as a JSON object.

    It runs with ``python``, or in the port's own environment. Raises InstallError where that cannot
    be made, has other packages, or a GPU is needed and not there.
    """
    if not recorder.objects:
        raise InstallError("the port has no backend; name its classes in OBJECTS")
    if recorder.needs_gpu and not _has_gpu():
        raise InstallError("it needs a CUDA device, and there is none here")
    python = python or python_of(environment(recorder, cache))
    versions = installed(python, recorder)
    runs = {name: _run(recorder, name, python, profile) for name in recorder.objects}
    return {
        "schema": 1,
        "name": recorder.name,
        "title": recorder.title,
        "requires": [*recorder.requires, *recorder.npm],
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "profile": profile,
        "runs": runs,
    }


def _has_gpu() -> bool:
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not is_hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def _run(recorder: Recorder, backend: str, python: Path, profile: str) -> dict[str, Any]:
    """Run the suite on one backend; return its report, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        port = f"{PORTS}.{recorder.name}:{backend}"
        command = [
            *(str(python), "-m", "llama_parity", "test", port, "--no-basic"),
            *("--profile", profile, "--report", str(report)),
            *_without_stated(recorder, Path(folder)),
        ]
        begun = time.monotonic()
        output, code, is_over = _within(command, recorder, Path(folder))
        found: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1)}
        if is_over:
            found["over"] = f"the time limit of {recorder.minutes:g} minutes"
        if report.exists():
            text = without_places(report.read_text(encoding="utf-8"), python, folder)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return found | _of_report(json.loads(text, parse_constant=_refuse))
            output = "its report is not one of the suite"
        lines = [line for line in output.splitlines() if line.strip()]
        last = printable(without_places((lines or ["no output"])[-1], python, folder), 300)
        return found | {"error": f"{last} ({_ended(code)})", "checks": []}


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _ended(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:  # of real time
        return f"ended by signal {-code}"


def _without_stated(recorder: Recorder, folder: Path) -> list[str]:
    """Return the flags that leave out the checks of keys that a package's user states by hand."""
    if not recorder.stated:
        return []
    file = folder / "stated"
    why = "not covered: the package does not read it, its user states it"
    file.write_text("".join(f"test_*[{key}*  # {why}\n" for key in recorder.stated))
    return ["--skips-file", str(file)]


def without_places(text: str, python: Path, folder: str) -> str:
    """Return a report's text with files named by their places in the clone and the environment."""
    root = python.parent.parent
    # Of a Python of the system, /usr and / are no places of its own.
    own = [str(root)] if (root / "pyvenv.cfg").exists() else []
    for place in (folder, *own, str(ROOT)):
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


def _within(command: list[str], recorder: Recorder, folder: Path) -> tuple[str, int, bool]:
    """Run a command inside the port's time limit; return output's end, exit code, is stopped.

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
            # What the process started and left goes too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _end_of(log), process.returncode, is_over


def _end_of(log: Path) -> str:
    """Return the last 64 KiB of a file as text."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        return file.read().decode("utf-8", errors="replace")
