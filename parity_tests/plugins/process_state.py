"""The state of the tests' process: threads, precision, token caches and uninitialised memory.

Torch is never imported here, only found among the imported modules: the tests of an implementation
in another framework run without it.
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
    """Set torch's number of threads to THREADS, once.

    The models here are too small for a second thread, and waiting threads slow down other
    processes.
    """
    torch.set_num_threads(THREADS)


def pytest_collection_finish() -> None:
    if sys.modules.get("torch"):
        limit_threads(sys.modules["torch"])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Check the operands of a test's products under --poison."""
    if not os.environ.get(POISONED):
        return (yield)
    from . import poison

    with poison.watched(pyfuncitem):
        return (yield)


@pytest.fixture(autouse=True)
def _own_token_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put the tests' token caches into one temporary folder of the run, not the user's."""
    folder = Path(tmp_path_factory.getbasetemp()) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@functools.cache
def measured_once(peak_flops: Any) -> Any:
    """Return the function, cached by device and precision."""
    return functools.cache(peak_flops)


@pytest.fixture(autouse=True)
def _peak_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's peak speed once for all tests."""
    if MEASURING in sys.modules:
        module = sys.modules[MEASURING]
        monkeypatch.setattr(module, "peak_flops", measured_once(module.peak_flops))


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """Give every test torch's default matmul precision; training sets its own for the process.

    Before the test, too: a fixture of several tests, which trains, is set up earlier than this one.
    """
    _reset_precision()
    yield
    _reset_precision()


def _reset_precision() -> None:
    if torch := sys.modules.get("torch"):
        limit_threads(torch)
        torch.set_float32_matmul_precision("highest")
