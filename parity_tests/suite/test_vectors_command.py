"""The command that lists, copies and checks the golden vectors: its lines and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from ..vectors.command import main
from ..vectors.results import expected
from .vector_traces import CASES, MODELS, write_case


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    for case in CASES.values():
        if case.basic:
            write_case(folder, case, expected(case, MODELS[case.model]), "float32")
    return folder


def test_a_right_port_passes_and_a_wrong_one_is_named(
    traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(traces)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{len(CASES)} cases: 0 failed")
    case = CASES["basic-order"]
    results = expected(case, MODELS[case.model])
    results["call.0.logits"] *= 1.01
    write_case(traces, case, results, "float32")
    assert main(["check", str(traces), "--float32-angles"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("failed      basic-order: call.0.logits at ")
    assert "rope_backwards" in lines[0]
    assert sum(line.startswith("failed") for line in lines) == 1


def test_the_list_and_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES)
    assert "needs positions, mask" in next(line for line in lines if line.startswith("packed "))
    assert main(["copy", str(tmp_path / "new")]) == 0
    assert f"{len(CASES)} cases copied" in capsys.readouterr().out
    assert main(["list", "--vectors", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "list|copy|check"),
        (["frob"], "invalid choice: 'frob'"),
        (["check"], "folder"),
        (["check", "/no/such"], "/no/such: no such folder"),
        (["check", "FOLDER", "--vectors", "FOLDER"], "index.json"),
        (["check", "FOLDER"], "has no trace of a case"),
        (["copy", "/proc/none/of/it"], "/proc/none/of/it"),
        (["list", "--no-flag"], "unrecognized arguments: --no-flag"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path) if word == "FOLDER" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_it_imports_neither_torch_nor_what_tests_need() -> None:
    program = (
        "import sys; from parity_tests.vectors.command import main; main(['list']); "
        "print({'torch', 'hypothesis', 'pytest', 'gguf'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
