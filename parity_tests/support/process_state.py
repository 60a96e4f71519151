"""What tests find in their process and must not leave behind: threads, precision, caches, memory.

Torch is looked for among the imported modules and never imported here: the tests of an
implementation in another framework run without it.
"""

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .cores import THREADS
from .environment import POISONED

# The module whose ``peak_flops`` measures this machine, for most of a tiny run's time.
MEASURING = "llama_torch.training.throughput"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("parity").addoption(
        "--poison", action="store_true", help="let memory that nothing has written hold NaN"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("poison"):
        from . import poison

        poison.install()


@functools.cache
def limit_threads(torch: Any) -> None:
    """Give torch one thread, once.

    Models here are too small for a second one, and threads that wait for each other cost more
    than they bring wherever something else runs.
    """
    torch.set_num_threads(THREADS)


def pytest_collection_finish() -> None:
    if sys.modules.get("torch"):
        limit_threads(sys.modules["torch"])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Watch the products of a poisoned test."""
    if not os.environ.get(POISONED):
        return (yield)
    from . import poison

    with poison.watched(pyfuncitem):
        return (yield)


@pytest.fixture(autouse=True)
def _own_token_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the tests' token caches out of the user's, in one place for the whole run."""
    folder = Path(tmp_path_factory.getbasetemp()) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@functools.cache
def measured_once(peak_flops: Any) -> Any:
    """Return the function with one answer for each device and precision."""
    return functools.cache(peak_flops)


@pytest.fixture(autouse=True)
def _peak_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine can do is the same for every run here."""
    if MEASURING in sys.modules:
        module = sys.modules[MEASURING]
        monkeypatch.setattr(module, "peak_flops", measured_once(module.peak_flops))


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """Undo what a training run sets for its whole process."""
    before = "highest"  # torch's default, where the test is the first to import it
    if sys.modules.get("torch"):
        limit_threads(sys.modules["torch"])
        before = sys.modules["torch"].get_float32_matmul_precision()
    yield
    if sys.modules.get("torch"):
        sys.modules["torch"].set_float32_matmul_precision(before)
