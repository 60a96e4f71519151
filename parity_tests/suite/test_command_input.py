"""Wrong command lines of llama-parity test: one line each and exit code 2."""

import importlib.util
import os
from pathlib import Path

import pytest

from .conftest import Run

NUMPY = "parity_tests.suite.toy_ports:"
QUICK = "--profile", "quick", "-n", "0"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no implementation is named; give MODULE:OBJECT"),
        ("--basic -k mine:Port", "no implementation is named"),
        ("nowhere:Port", "nowhere:Port: cannot be imported (ModuleNotFoundError: No module named"),
        (f"{NUMPY}Smal", f"did you mean {NUMPY}Small?"),
        (f"{NUMPY}Small.context", "it has no such object"),
        ("parity_tests.backends:DEFAULT", "has no method logits"),
        (f"{NUMPY}WithoutEngine", "limits.cache is 'engine', without a method"),
        ("parity_tests.suite.test_backends:OddFractions.nan", "example_fraction must be a number"),
        ("nothing", "give package.module:object, FILE.py:object or one of torch, "),
        ("none.py:Port", "none.py:Port: no such file"),
        (f"{NUMPY}Small --profile quik", "--profile quik: not one of quick, default, thorough, s"),
        (f"{NUMPY}Small --report", "--report: expected one argument"),
        (f"{NUMPY}Small --basic --report no/where.json", "/no; make it first"),
        ("--new port.txt", "give the name of a Python module, as my_llama.py"),
        ("--new no/port.py", "there is no directory no"),
        (f"{NUMPY}Small --basic --report /proc/report.json", "/proc/report.json: cannot be writ"),
        ("--new port.py more", "--new takes nothing beside it"),
        ("--new new.py/port.py", "there is no directory new.py"),
        ("--new numpy.py", "an installed module has the name numpy"),
        ("--new typing.py", "give it another name, as my_typing.py"),
        ("--new reference_np.py", "an installed module has the name reference_np"),
        ("numpy.py:Port", "numpy.py:Port: an installed module has the name numpy"),
        (f"{NUMPY}Small --profil quick", "--profil: no such flag; did you mean --profile?"),
        (f"{NUMPY}Small --basics", "--basics: no such flag; did you mean --basic?"),
        (f"{NUMPY}Small --skip-file=x", "--skip-file: no such flag; did you mean --skips-file?"),
        ("--lst", "--lst: no such flag; did you mean --list?"),
        (f"{NUMPY}Small --qqq", "--qqq: no such flag; see llama-parity test --help"),
        (f"{NUMPY}Small -n", "-n: its value is missing"),
        (f"{NUMPY}Small --junitxml /proc/x.xml", "--junitxml /proc/x.xml: cannot be written the"),
        (f"{NUMPY}Small --junit-xml=/proc/no/x.xml", "--junit-xml /proc/no/x.xml: cannot be writ"),
        (f"{NUMPY}Small --basic --junitxml x", "--basic checks the adapter alone: --junitxml x wo"),
        (f"{NUMPY}Small --basic --skips-file=no", "--skips-file=no would change nothing; leave it"),
        (f"--basic --profile quick {NUMPY}Small", "--profile would change nothing"),
        (f"{NUMPY}Small --list --check test_trace", "--list prints the ids of all checks: --check"),
        ("--list --report x.json", "--report would change nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    run: Run, tmp_path: Path, line: str, message: str
) -> None:
    for name in ("new.py", "numpy.py"):
        if f"{name}/" in line or line.startswith(f"{name}:"):
            (tmp_path / name).touch()
    code, out, err = run(*line.split())
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tests", "tests: no flag takes this word"),
        ("mine:Small", "mine:Small: a second implementation; run the command once for each"),
        ("test_conformance.py::test_logits", "--check test_logits runs one check"),
        ("--check=nonsuch", "nonsuch names no check; llama-parity test --list prints the ids of"),
    ],
)
def test_a_word_that_pytest_would_take_is_refused(run: Run, word: str, message: str) -> None:
    code, _, err = run(f"{NUMPY}Small", *QUICK, word)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("flag", ["-n 2", "-n2", "--numprocesses=2", "--dist load"])
def test_a_flag_of_a_package_that_is_not_installed_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run(f"{NUMPY}Small", *flag.split())
    assert (code, out) == (2, "")
    assert "needs pytest-xdist" in err
    assert "pip install pytest-xdist, or leave" in err
    assert err.count("\n") == 1


def test_pytests_own_flags_pass(run: Run) -> None:
    own = "--tb=short", "-x", "--durations", "3", "--junitxml", "made/x.xml", "-k", "nothing_at_all"
    assert run(f"{NUMPY}Refusing", *own)[0] == 1  # the adapter's check was reached
    assert not Path("made").exists()


def test_a_pipe_is_not_replaced_by_a_report(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run(f"{NUMPY}Small", "--basic", "--report", "pipe")
    assert (code, err) == (2, "error: --report pipe: is no file; give the name of one\n")
    assert (tmp_path / "pipe").is_fifo()
