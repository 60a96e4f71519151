"""Names the suite's plug-ins; none imports torch unless the tests that run do."""

import os
from collections.abc import Iterator

import pytest

# Before NumPy is imported: as many threads as torch gets (plugins/process_state.py says why).
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("PARITY_THREADS", "1"))

from parity_tests.plugins import PLUGINS

# In the repository's root, so that pytest knows the options in every folder of it.
pytest_plugins = list(PLUGINS)

# What says how a program's output looks; where CI is set, pytest prints a failure twice.
APPEARANCE = ("CI", "BUILD_NUMBER", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS")


@pytest.fixture(scope="session", autouse=True)
def _usual_appearance() -> Iterator[None]:
    """Give tests and their subprocesses the same output whatever the environment asks for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in APPEARANCE:
            patch.delenv(name, raising=False)
        yield
