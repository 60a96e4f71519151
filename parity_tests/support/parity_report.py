"""Record errors by test and backend, skip or fail tests that compared nothing, print the tables."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from ..conformance.judge import JUDGE
from . import processors, summary_tables
from .backend_option import (
    HONEST,
    MUTANTS,
    backend_name,
    is_conformance,
    other_parameters,
    requested_backends,
    unsupported_by_backend,
)

# The processors and libraries of pytest-xdist's processes; empty without pytest-xdist.
computed_by: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Begin a conformance test's record; a test that compared nothing does not pass."""
    if not is_conformance(pyfuncitem):
        return (yield)
    return (yield from _recorded(pyfuncitem))


def _recorded(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    test = pyfuncitem.originalname
    words = [test.removeprefix("test_"), *other_parameters(pyfuncitem)]
    entry = JUDGE.begin(" ".join(words), backend_name(pyfuncitem))
    lacking = unsupported_by_backend(pyfuncitem)
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
            else summary_tables.backend_table(
                JUDGE.entries, in_full=bool(requested_backends(config))
            )
        )
        terminalreporter.section("parity")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the record of a process that ends (a hook of pytest-xdist's)."""
    output = getattr(node, "workeroutput", {})
    JUDGE.add(output.get("judged", []))
    computed_by.update(output.get("computed_by", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run of the whole suite that a mutant survives; send a process's record to the main."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["judged"] = JUDGE.records()
        session.config.workeroutput["computed_by"] = [processors.describe()]
        return
    whole = JUDGE.only_record and exitstatus == 0 and not session.config.getoption("keyword")
    if whole and summary_tables.survivors(JUDGE.entries, MUTANTS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
