"""The files of expected failures: a line that nothing needs is an error, lest it hide a bug."""

import json

import pytest

from ..support.port_folders import QUICK, in_folder

EXPECTED = in_folder(
    *("test", "mine.py:SmallWithTiledHeads", *QUICK, "--xfails-file", "all.txt"),
    *("--report", "report.json", "-n", "2"),
)
UNEXPECTED = in_folder("test", "mine:Small", *QUICK, "--xfails-file", "xfails.txt", "-k", "logits")
WRONG_LINE = in_folder("test", "mine:Small", *QUICK, "--skips-file", "wrong.txt")
STALE = in_folder(
    *("test", "mine:SmallWithTiledHeads", *QUICK, "--xfails-file", "stale.txt"),
    *("--report", "report.json"),
)
CHOSEN = in_folder(
    *("test", "mine:SmallWithTiledHeads", *QUICK, "--xfails-file", "stale.txt"),
    *("--check", "test_logits", "--check", "test_trace"),
)


def test_expected_failures_are_green_in_several_processes() -> None:
    pytest.importorskip("xdist")
    done = EXPECTED.done()
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((EXPECTED.folder / "report.json").read_text())
    verdicts = [check["verdict"] for check in report["backends"][0]["checks"]]
    assert report["verdict"] == "passed"
    assert verdicts.count("expected failure") == 4


def test_an_expected_failure_that_passes_is_an_error() -> None:
    done = UNEXPECTED.done()
    assert done.returncode == 1
    line = "test_logits passes, and xfails.txt:1 has it as an expected failure (tiled): remove the"
    assert line in done.stdout


def test_a_line_that_names_no_check_is_one_line_and_exit_code_two() -> None:
    done = WRONG_LINE.done()
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: wrong.txt:2: test_logits_in[flot32] names no check; did you m")


def test_a_line_in_whose_checks_nothing_was_compared_is_an_error() -> None:
    done = STALE.done()
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    is_stale = "is an expected failure, and nothing was compared in it"
    assert failed == [
        f"FAILED stale.txt:2: test_trace {is_stale} (trace is not offered): remove the line",
        f"FAILED stale.txt:3: test_training[1] {is_stale} (train is not offered): remove the line",
        f"FAILED stale.txt:4: test_pa*ing {is_stale} (by limit: masks = causal; "
        "by limit: cache = none): remove the line",
    ]
    report = json.loads((STALE.folder / "report.json").read_text())
    assert report["verdict"] == "failed"
    assert report["stale_lines"] == [line.removeprefix("FAILED ") for line in failed]


def test_a_choice_of_checks_makes_no_line_stale() -> None:
    done = CHOSEN.done()
    assert done.returncode == 0, done.stdout + done.stderr
