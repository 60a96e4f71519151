"""The suite's model directories are read by this project's own programs, tokenizer and all."""

import pytest

from ..support.suite_runs import suite

FILE = "parity_tests/conformance/test_directories.py"
NAMES = ("Loaded", "ByGguf")
RUNS = {name: suite(FILE, f"--backend=parity_tests.suite.own_loaders:{name}") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_program_of_this_project_reads_every_directory(name: str) -> None:
    if name == "ByGguf":
        pytest.importorskip("gguf")
    done = RUNS[name].done()
    assert done.returncode == 0, done.stdout
