"""The search for a smaller failing example ends, and what an implementation prints is shortened."""

import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..conformance import drawn, shrinking
from ..conformance.judge import Judge
from ..plugins.failure_report import PRINTED
from ..support.suite_runs import suite

TALKATIVE = "parity_tests.suite.toy_ports:Talkative"
RED = suite(
    f"parity_tests/conformance/test_conformance.py::test_causal_logits[{TALKATIVE}]",
    f"--backend={TALKATIVE}",
)


@drawn.composite
def numbers(draw: drawn.Draw) -> int:
    return draw(st.integers(0, 10_000), label="number")


def failing_numbers(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers that are compared where those above ten fail."""
    monkeypatch.setattr(shrinking, "SECONDS", seconds)
    judge, seen = Judge(), []

    @settings(derandomize=True, database=None, max_examples=50, report_multiple_bugs=False)
    @given(number=numbers())
    def compared(number: int) -> None:
        judge.compare(None, "float64", lambda _: seen.append(number) or fail(number), {})

    def fail(number: int) -> dict:
        if number > 10:
            raise ValueError(number)
        return {}

    with pytest.raises(ValueError, match=r"\d"):
        compared()
    return [number for number in seen if number > 10]


def test_a_smaller_example_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing_numbers(30.0, monkeypatch)[-1] == 11


def test_the_search_ends_when_its_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    found = failing_numbers(0.0, monkeypatch)
    assert set(found) == {found[0]}


def test_an_example_that_passed_is_run_again_when_the_time_is_spent() -> None:
    """Rejected then, it would have two results, which Hypothesis reports in place of the error."""
    search = shrinking.Shrinking()
    assert not search.is_over("passes")
    search.begun("passes")
    search.begun("fails")
    search.failed()
    search.end()
    assert [search.is_over(example) for example in ("passes", "fails", "new")] == [0, 0, 1]


def printed_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("this port computes")]


def test_what_a_port_prints_is_shortened() -> None:
    done = RED.done()
    assert done.returncode == 1
    assert "other lines (--show-capture=no leaves out all)" in done.stdout
    assert len(printed_lines(done)) == PRINTED
