"""The option --reproduce: what is no example is bad input, and one whose bug is fixed passes."""

import re

import pytest

from ..support.jobs import Job
from ..support.suite_runs import suite

WRONG = "parity_tests.suite.test_backends:Wrong"
LOGITS = "--check", "test_logits"


def command(port: str, *arguments: str) -> Job:
    """Return a run of the command on a port."""
    quick = "--profile", "quick", "-n", "0", "--no-basic"
    return Job(lambda _: ("-m", "llama_parity", "test", port, *quick, *arguments))


FAILING = command(WRONG, *LOGITS)
KEY = "--check", "test_key_of_config_json[head_dim (transformers 4)]"
# What is given, the rest of the command line, and words of the one line of the answer.
REFUSED = {
    "no base64": ("xyz", (WRONG, *LOGITS), "xyz: is no example; copy it whole from the last line"),
    "a part": ("AXicY2BgYGBkAAE", (WRONG, *LOGITS), "is no example; copy it whole"),
    "nothing": ("", (WRONG, *LOGITS), "is no example; copy it whole"),
    "another test's": ("AAA=", (WRONG, *LOGITS), "AAA=: is no example of test_logits["),
    "several tests": ("AAA=", (WRONG, "--check", "test_logits*"), "needs one test, 4 are selected"),
    "a fixed example": (
        "AAA=",
        ("parity_tests.suite.toy_loaders:Reader", *KEY),
        "draws no examples; run it without --reproduce",
    ),
}
JOBS = {
    name: command(*arguments, "--reproduce", blob) for name, (blob, arguments, _) in REFUSED.items()
}
BY_PYTEST = suite("parity_tests/conformance", f"--backend={WRONG}", *LOGITS, "--reproduce", "xyz")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_example_is_one_line_and_exit_code_two(name: str) -> None:
    done = JOBS[name].done()
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --reproduce ")
    assert REFUSED[name][-1] in line
    assert "FAILED" not in done.stdout


def test_pytest_alone_refuses_it_too() -> None:
    done = BY_PYTEST.done()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--reproduce xyz: is no example; copy it whole" in done.stderr


def test_an_example_fails_again_and_passes_once_the_bug_is_fixed() -> None:
    found = re.search(r"^again .* --reproduce (\S+)$", FAILING.done().stdout, re.MULTILINE)
    assert found is not None
    again = command(WRONG, *LOGITS, "--reproduce", found[1]).done()
    assert again.returncode == 1
    assert "1 compared" in again.stdout
    fixed = command("parity_tests.conformance.oracle:Oracle", *LOGITS, "--reproduce", found[1])
    assert fixed.done().returncode == 0, fixed.done().stdout
    assert "1 passed" in fixed.done().stdout
