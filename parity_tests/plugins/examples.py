"""Hypothesis's profiles, and the option --reproduce for one failing example."""

import os

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings

from ..conformance import drawn

COMMON = {
    "deadline": None,  # the first example includes torch's warm-up
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
# The first two draw the same examples on every machine, so that a run here is CI's.
settings.register_profile("quick", max_examples=5, derandomize=True, **COMMON)
# The first failing example as it is drawn: to know that a port fails, and in which test.
settings.register_profile(
    "unshrunk", settings.get_profile("quick"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("default", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("search", max_examples=15, derandomize=False, **COMMON)
settings.register_profile("thorough", max_examples=2000, derandomize=False, **COMMON)
drawn.ignore_constants()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("parity").addoption(
        "--reproduce", metavar="BLOB", help="run one failing example again, as its report says"
    )


@pytest.hookimpl(trylast=True)  # after -k and --backend
def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to reproduce an example of more than one test."""
    items = session.items
    if session.config.getoption("reproduce") and len(items) != 1:
        raise pytest.UsageError(f"--reproduce needs one test, {len(items)} are selected")


@pytest.hookimpl(trylast=True)  # after the backend's number of examples is set
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the test run only the example of --reproduce."""
    blob = item.config.getoption("reproduce")
    if blob:
        reproduce = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())
        item.obj = reproduce(item.obj)
