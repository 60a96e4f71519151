"""The command that lists, copies and checks the golden vectors: its lines and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama_parity.command.vectors import main

from .vector_traces import CASES, right, write_basic, write_case

Capture = pytest.CaptureFixture[str]


def test_a_right_port_passes_and_a_wrong_one_is_named(tmp_path: Path, capsys: Capture) -> None:
    traces = write_basic(tmp_path / "traces", "float32")
    assert main(["check", str(traces)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{len(CASES)} cases: 0 failed")
    results = right("basic-order")
    results["call.0.logits"] *= 1.01
    write_case(traces, CASES["basic-order"], results, "float32")
    assert main(["check", str(traces), "--float32-angles"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("failed      basic-order: call.0.logits at ")
    assert "rope_backwards" in lines[0]
    assert sum(line.startswith("failed") for line in lines) == 1


def test_the_list_and_a_copy_whose_own_traces_pass(tmp_path: Path, capsys: Capture) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES)
    assert "needs positions, mask" in next(line for line in lines if line.startswith("packed "))
    copy = tmp_path / "new"
    assert main(["copy", str(copy)]) == 0
    assert f"{len(CASES)} cases copied to {copy}" in capsys.readouterr().out
    assert main(["list", "--vectors", str(copy)]) == main(["list", f"--vectors={copy}"]) == 0
    assert capsys.readouterr().out.splitlines() == 2 * lines
    assert main(["check", "--vectors", str(copy), str(copy / "traces")]) == 0
    assert "0 failed, 0 not covered" in capsys.readouterr().out


def test_help_is_printed(capsys: Capture) -> None:
    for argv in ([], ["--help"], ["check", "-h"]):
        assert main(argv) == 0
        assert "llama-parity vectors check FOLDER [--float32-angles]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lst", "vectors lst: no such action; did you mean list?"),
        ("frob", "vectors frob: no such action; give one of list, copy, check"),
        ("copy", "vectors copy: takes one folder, got none"),
        ("check", "vectors check: takes one folder, got none"),
        ("check FOLDER FOLDER", "vectors check: takes one folder, got "),
        ("list all", "vectors list: takes nothing after it, got all"),
        ("list --no-flag", "vectors list: has no flag --no-flag; see"),
        ("copy FOLDER --float32-angles", "vectors copy: has no flag --float32-angles"),
        ("check FOLDER --angles", "has no flag --angles; did you mean --float32-angles?"),
        ("check FOLDER --vectors", "vectors check: --vectors takes a folder, got none"),
        ("check /no/such", "/no/such: no such folder"),
        ("check FOLDER", "has no trace of a case"),
        ("check FOLDER --vectors FOLDER", "index.json: cannot be read"),
        ("list --vectors FOLDER", "index.json: cannot be read"),
        ("copy /proc/none/of/it", "/proc/none/of/it: cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    line: str, words: str, tmp_path: Path, capsys: Capture
) -> None:
    arguments = [str(tmp_path) if word == "FOLDER" else word for word in line.split()]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_it_imports_neither_torch_nor_what_tests_need() -> None:
    program = (
        "import sys; from llama_parity.command.vectors import main; main(['list']); "
        "print({'torch', 'hypothesis', 'pytest', 'gguf'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
