"""Run whole folders of tests on several processes, one a core, where pytest-xdist is installed."""

import gc
import os
from pathlib import Path

import pytest

THREADS = int(os.environ.get("PARITY_THREADS", "1"))  # of torch and NumPy, in each process
WORKERS = 8  # processes at most, as all import torch at once


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Set the number of processes.

    A single file or test runs in this one: every further process imports torch for some seconds.
    """
    option = config.option
    some = option.keyword or getattr(option, "check", None)
    whole = all(Path(arg).is_dir() for arg in config.args) and not some
    if hasattr(config, "workerinput") or option.collectonly:
        return
    # These options need the terminal, or one test in one process.
    if option.usepdb or option.trace or option.capture == "no" or option.reproduce:
        return
    if getattr(option, "numprocesses", 0) is None and whole:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(WORKERS, (cores or 1) // THREADS)
        if workers > 1:
            option.numprocesses, option.dist = workers, "worksteal"


def pytest_collection_finish() -> None:
    """Exempt the half a million objects of imported libraries from garbage collection."""
    gc.collect()
    gc.freeze()
