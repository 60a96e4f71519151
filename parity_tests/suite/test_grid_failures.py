"""What goes wrong while the grid runs costs that row alone, and nothing that is there already."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..grid import __main__ as grid
from ..grid import environments, running
from ..grid.environments import InstallError, environment, installed
from ..grid.recorders import Recorder

TOY = Recorder("toy_loaders", "A toy", ("numpy",), ("Reader",))
OTHER = Recorder("no_such_module", "Another", ("numpy",), ("Port",))
OLD = {"schema": 1, "name": "toy_loaders", "date": "2026-01-01", "runs": {"Port": {}}}
# What stands in for ``python -m llama_parity test ... --report FILE``.
REPORT = "import sys; open(sys.argv[sys.argv.index('--report') + 1], 'w').write('{}')\n"

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the grid on these recorders, with this Python's own packages."""

    def call(recorders: list[Recorder], *argv: str, python: Any = sys.executable) -> int:
        monkeypatch.setattr(grid, "chosen", lambda names: recorders)
        return grid.main(["run", "--results", str(tmp_path), "--python", str(python), *argv])

    return call


@pytest.fixture
def suite_is(tmp_path: Path) -> Callable[[str], Path]:
    """Return a maker of a Python that runs a program in place of the suite."""

    def make(program: str) -> Path:
        (tmp_path / "program.py").write_text(program)
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
            f'exec {sys.executable} {tmp_path}/program.py "$@"\n'
        )
        python.chmod(0o755)
        return python

    return make


def found(folder: Path, recorder: Recorder = TOY) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{recorder.name}.json").read_text())
    return result


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.parametrize("why", ["no network", "no GPU"])
def test_a_row_that_cannot_be_run_keeps_the_result_that_it_has(
    run: Run, tmp_path: Path, monkeypatch: Any, capsys: Any, why: str
) -> None:
    (tmp_path / "toy_loaders.json").write_text(json.dumps(OLD))
    recorder = TOY
    if why == "no GPU":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        recorder = Recorder("toy_loaders", "A toy", ("numpy",), ("Reader",), needs_gpu=True)
    else:

        def refuse(*_: Any) -> Any:
            raise InstallError("no network")

        monkeypatch.setattr(grid, "run_recorder", refuse)
    assert run([recorder]) == 0
    assert found(tmp_path) == OLD
    out = capsys.readouterr().out
    assert "not run: " in out
    assert "; the result of 2026-01-01 stays" in out


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (REPORT, "its report is not one of the suite (exit code 0)"),
        (REPORT.replace("{}", '{"schema": NaN'), "its report is not one of the suite"),
        ("", "no output (exit code 0)"),
        ("import os; os.abort()", "no output (ended by SIGABRT)"),
        ("print('x' * 3_000_000)", "characters left out"),
        ("import os; os.write(1, b'\\x1b[31m\\xff'); os._exit(3)", "(exit code 3)"),
    ],
)
def test_a_run_without_a_report_says_how_it_ended_and_stops_no_other(
    run: Run, tmp_path: Path, suite_is: Any, capsys: Any, program: str, error: str
) -> None:
    assert run([TOY, OTHER], python=suite_is(program)) == 0
    for recorder in (TOY, OTHER):
        (one,) = found(tmp_path, recorder)["runs"].values()
        assert error in one["error"]
        assert len(one["error"]) < 400
    assert "\x1b" not in capsys.readouterr().out


def test_no_process_of_a_run_outlives_it(run: Run, tmp_path: Path, suite_is: Any) -> None:
    program = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    assert run([TOY], python=suite_is(f"{program}; import os; os._exit(1)")) == 0
    pid = int(found(tmp_path)["runs"]["Reader"]["error"].split()[0])
    for _ in range(100):  # SIGKILL is sent; the process may still have to take it
        if not is_alive(pid):
            break
        time.sleep(0.1)
    assert not is_alive(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_kill_ends_the_suite_with_the_grid(tmp_path: Path, suite_is: Any, number: int) -> None:
    noted = tmp_path / "pid"
    python = suite_is(
        f"import os, time; open('{noted}', 'w').write(str(os.getpid())); time.sleep(600)"
    )
    command = [sys.executable, "-m", "parity_tests.grid", "run", "onnx_reference"]
    patch = (
        "import sys; from parity_tests.grid import __main__ as grid, running; "
        "running.installed = lambda *_: {}; sys.exit(grid.main(sys.argv[1:]))"
    )
    command[1:3] = ["-c", patch]
    process = subprocess.Popen(
        [*command, "--python", str(python), "--results", str(tmp_path / "results")],
        cwd=running.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if noted.exists() and noted.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)


def test_a_relative_python_and_the_name_of_one_are_those_of_the_current_folder(
    run: Run, tmp_path: Path, suite_is: Any, monkeypatch: Any, capsys: Any
) -> None:
    suite_is("print('here')")
    monkeypatch.chdir(tmp_path)
    assert run([TOY], python="./python") == 0
    assert found(tmp_path)["runs"]["Reader"]["error"] == "here (exit code 0)"
    assert run([TOY], python="no/python") == 2
    message = "error: --python no/python: no such program; give an environment's bin/python\n"
    assert capsys.readouterr().err == message


def test_results_that_cannot_be_written_are_told_before_the_run(
    run: Run, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(grid, "run_recorder", lambda *_: pytest.fail("ran first"))
    (tmp_path / "file").touch()
    (tmp_path / "toy_loaders.json").mkdir()
    assert run([TOY], "--results", str(tmp_path / "file")) == 2
    assert "file: no folder can be made there (File exists)" in capsys.readouterr().err
    assert run([TOY]) == 2
    assert run([TOY], "--results", "") == 2
    assert "--results must not be empty" in capsys.readouterr().err


def test_a_package_that_is_missing_or_of_another_version_is_not_run(run: Run, capsys: Any) -> None:
    for requirement, why in (
        ("numpy==0.1", "has numpy "),
        ("no_such.package==1", "lacks no-such-package"),
    ):
        assert run([Recorder("toy_loaders", "A toy", (requirement,), ("Reader",))]) == 0
        out = capsys.readouterr().out
        assert why in out
        assert f"; the port is of {requirement}" in out
    dotted = Recorder("x", "X", ("Typing.Extensions",), ())
    assert "typing-extensions" in installed(Path(sys.executable), dotted)


def test_a_name_given_twice_runs_once() -> None:
    assert [one.name for one in grid.chosen(["litgpt", "litgpt"])] == ["litgpt"]


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the installers by one that makes the environment's folder and notes the command."""
    calls: list[str] = []

    def call(command: list[str]) -> None:
        calls.append(" ".join(command))
        if "venv" in command:
            Path(command[-1]).mkdir()
        time.sleep(0.2)

    monkeypatch.setattr(environments, "_call", call)
    return calls


def test_an_environment_that_a_kill_left_is_made_anew(installs: list[str], tmp_path: Path) -> None:
    folder = environment(TOY, tmp_path)
    (folder / "complete").unlink()
    (folder / "half").touch()
    assert environment(TOY, tmp_path) == folder
    assert (folder / "complete").exists()
    assert not (folder / "half").exists()


def test_ctrl_c_while_a_package_is_installed_leaves_no_environment(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def call(command: list[str]) -> None:
        (tmp_path / "made").touch()
        if "pip" in command:
            raise KeyboardInterrupt
        Path(command[-1]).mkdir()

    monkeypatch.setattr(environments, "_call", call)
    with pytest.raises(KeyboardInterrupt):
        environment(TOY, tmp_path)
    assert (tmp_path / "made").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_two_runs_at_once_make_an_environment_once(installs: list[str], tmp_path: Path) -> None:
    threads = [threading.Thread(target=environment, args=(TOY, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([command for command in installs if "venv" in command]) == 1


def test_environments_of_a_relative_folder_are_those_of_the_current_one(
    installs: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment(TOY, Path("made")).parent == tmp_path / "made"
