"""Record errors by test and backend, skip or fail tests that compared nothing, print the tables."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from reference_np.backend import load
from reference_np.limits import limits_of

from ..conformance.calls import ParityError
from ..conformance.judge import JUDGE
from . import processor, summary_tables
from .advice import comparison_commands, failed_checks
from .backend_option import (
    HONEST,
    MUTANTS,
    backend_name,
    beyond_a_limit,
    command_of,
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


def entry_key(item: Any) -> tuple[str, str]:
    """Return the test and the backend under which a conformance test is recorded."""
    words = [item.originalname.removeprefix("test_"), *other_parameters(item)]
    return " ".join(words), backend_name(item)


def _recorded(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    test = pyfuncitem.originalname
    entry = JUDGE.begin(*entry_key(pyfuncitem))
    if limit := beyond_a_limit(pyfuncitem):
        entry.by_limit[limit] += 1
        pytest.skip(f"not covered, by limit: {limit}")
    lacking = unsupported_by_backend(pyfuncitem)
    if lacking:
        entry.not_covered[f"{lacking} is not offered"] += 1
        pytest.skip(f"not covered: {lacking} is not offered")
    covered = entry.covered
    result = yield
    if entry.covered == covered:
        reason = ", ".join(entry.not_covered) or "no example was compared"
        if test in ("test_logits", "test_causal_logits") and not JUDGE.only_record:
            pytest.fail(f"logits are required, and none were computed: {reason}", pytrace=False)
        pytest.skip(f"not covered: {reason}")
    if JUDGE.overwritten:  # the next user of those arrays computes something else
        raise ParityError(JUDGE.overwritten)
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("computed by")
    for line in sorted(computed_by) or [processor.describe()]:
        terminalreporter.write_line(line)
    if JUDGE.entries:
        named = requested_backends(config)
        lines = (
            summary_tables.mutation_table(JUDGE.entries, MUTANTS, HONEST)
            if JUDGE.only_record
            else summary_tables.backend_table(
                JUDGE.entries, {name: limits_of(load(name)) for name in named}
            )
        )
        terminalreporter.section("parity")
        for line in (*lines, *too_few(config)):
            terminalreporter.write_line(line)
        failed = failed_checks(terminalreporter.stats.get("failed", ()))
        for name in named:
            for line in comparison_commands(name, failed.get(name, ()), bool(command_of(config))):
                terminalreporter.write_line(line)


def runs_all(config: pytest.Config) -> bool:
    """Return whether all tests of the backends were to run, and not a choice of them."""
    chosen = config.getoption("keyword") or any("::" in arg for arg in config.args)
    some = ("check", "deselect", "lf", "maxfail", "reproduce", "collectonly")
    return not chosen and not any(config.getoption(option, None) for option in some)


def too_few(config: pytest.Config) -> list[str]:
    """Return a line for each backend of --backend that was compared on too few examples.

    Only where all of its tests were to run.
    """
    if not runs_all(config):
        return []
    return summary_tables.below_the_floor(JUDGE.entries, requested_backends(config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the record of a process that ends (a hook of pytest-xdist's)."""
    output = getattr(node, "workeroutput", {})
    JUDGE.add(output.get("judged", []))
    computed_by.update(output.get("computed_by", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that a mutant survives or that compares too little; send a process's record."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["judged"] = JUDGE.records()
        session.config.workeroutput["computed_by"] = [processor.describe()]
        return
    whole = JUDGE.only_record and exitstatus == 0 and not session.config.getoption("keyword")
    if not exitstatus and too_few(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if whole and summary_tables.survivors(JUDGE.entries, MUTANTS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
