"""Tell the judge which test runs, fail a test that covered nothing, and print the last lines."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from ..conformance.judge import JUDGE
from . import processors, summary_tables
from .backend_option import (
    HONEST,
    MUTANTS,
    backend_name,
    chosen,
    is_conformance,
    lacks,
    other_parameters,
)

# What the processes of a shared run computed on; empty where this one computed by itself.
computed_by: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Tell the judge which test runs; nothing covered is not a pass."""
    if not is_conformance(pyfuncitem):
        return (yield)
    return (yield from _judged(pyfuncitem))


def _judged(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    test = pyfuncitem.originalname
    words = [test.removeprefix("test_"), *other_parameters(pyfuncitem)]
    entry = JUDGE.begin(" ".join(words), backend_name(pyfuncitem))
    lacking = lacks(pyfuncitem)
    if lacking:
        entry.not_covered[f"{lacking} is not offered"] += 1
        pytest.skip(f"not covered: {lacking} is not offered")
    result = yield
    if entry.covered == 0:
        reason = ", ".join(entry.not_covered) or "no example was compared"
        if test == "test_logits" and not JUDGE.only_record:
            pytest.fail(f"logits are required, and none were computed: {reason}", pytrace=False)
        pytest.skip(f"not covered: {reason}")
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("computed by")
    for line in sorted(computed_by) or [processors.describe()]:
        terminalreporter.write_line(line)
    if JUDGE.entries:
        lines = (
            summary_tables.mutation_table(JUDGE.entries, MUTANTS, HONEST)
            if JUDGE.only_record
            else summary_tables.backend_table(JUDGE.entries, in_full=bool(chosen(config)))
        )
        terminalreporter.section("parity")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the record of a process that ends (a hook of pytest-xdist's)."""
    output = getattr(node, "workeroutput", {})
    JUDGE.add(output.get("judged", []))
    computed_by.update(output.get("computed_by", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run of the whole suite that a mutant survives; hand on what a process recorded."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["judged"] = JUDGE.records()
        session.config.workeroutput["computed_by"] = [processors.describe()]
        return
    whole = JUDGE.only_record and exitstatus == 0 and not session.config.getoption("keyword")
    if whole and summary_tables.survivors(JUDGE.entries, MUTANTS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
