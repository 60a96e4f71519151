"""Hypothesis's profiles, and the option --reproduce for one failing example."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.core import decode_failure
from hypothesis.errors import DidNotReproduce

from ..conformance import drawn
from ..conformance.scope import is_drawn
from .backend_option import USAGE

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


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what is no example, before any test runs."""
    blob = config.getoption("reproduce")
    if blob is None:
        return
    try:
        decode_failure(blob.encode())
    except Exception:  # of whatever its bytes are taken for
        _refuse(blob, "is no example; copy it whole from the last line of a report")


def _refuse(blob: str, why: str) -> None:
    pytest.exit(f"--reproduce {blob}: {why}", USAGE)


@pytest.hookimpl(trylast=True)  # after -k and --backend
def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to reproduce an example of more than one test, or of one that draws none."""
    blob, items = session.config.getoption("reproduce"), session.items
    if blob is None:
        return
    if len(items) != 1:
        _refuse(blob, f"needs one test, {len(items)} are selected; name it as its report does")
    if not is_drawn(getattr(items[0], "obj", None)):
        _refuse(blob, f"{items[0].name} draws no examples; run it without --reproduce")


@pytest.hookimpl(trylast=True)  # after the backend's number of examples is set
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the test run only the example of --reproduce."""
    blob = item.config.getoption("reproduce")
    if blob is not None:
        reproduce = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())
        item.obj = reproduce(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Let an example of --reproduce pass once its bug is fixed; refuse that of another test."""
    try:
        return (yield)
    except DidNotReproduce as error:
        blob = pyfuncitem.config.getoption("reproduce")
        if blob is not None and "completed successfully" not in str(error):
            _refuse(
                blob,
                f"is no example of {pyfuncitem.name}, or of other limits, or of another version "
                "of the suite",
            )
        return True
