"""A run with --backend needs NumPy, ml_dtypes, safetensors, Hypothesis and pytest, not torch."""

from pathlib import Path

from ..support.jobs import Command, Job

# What these five bring with them is allowed too.
ALLOWED = (
    *("numpy", "ml_dtypes", "safetensors", "hypothesis", "pytest", "_pytest", "pluggy"),
    *("sortedcontainers", "iniconfig", "_"),  # "_": names that begin with it
    *("packaging", "pygments", "attr", "attrs", "py", "reference_np", "parity_tests", "mine"),
    "llama_common",
)
# Runs pytest where nothing else can be imported, as in a bare environment.
PROGRAM = f"""
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        package = name.partition(".")[0] if name[0] != "_" else "_"
        if package in {ALLOWED!r} or package in sys.stdlib_module_names:
            return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]
import pytest
sys.exit(pytest.main(["-p", "_hypothesis_pytestplugin", *sys.argv[1:]]))
"""
QUICK = "-q", "--hypothesis-profile", "quick", "-p", "no:cacheprovider"
CHOSEN = "-k", "test_logits or test_loss_and_grads"


def bare_run(body: str, *arguments: str) -> Job:
    """Return a run of the conformance tests on ``mine:Mine``, whose body is given."""

    def make(folder: Path) -> Command:
        source = "from parity_tests.conformance.oracle import Oracle\n\nclass Mine(Oracle):\n"
        (folder / "mine.py").write_text(source + body)
        program = f"import os; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\n{PROGRAM}"
        return "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}", *arguments

    return Job(make)


MINE = "--backend", "mine:Mine"
FOLDER = bare_run("    pass\n", "parity_tests/conformance", *MINE, *CHOSEN, *QUICK)
EVERYTHING = bare_run("    pass\n", "parity_tests/", *MINE, *CHOSEN, *QUICK)
DEFAULT = bare_run("    pass\n", "parity_tests/conformance", *CHOSEN, *QUICK)
NEEDY = bare_run("    import torch\n", "parity_tests/conformance", *MINE, *CHOSEN, *QUICK)


def test_the_conformance_suite_runs_without_torch() -> None:
    for run in (FOLDER, EVERYTHING):
        done = run.done()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 passed, 2 skipped" in done.stdout
        assert "torch" not in done.stdout


def test_backends_that_need_torch_are_skipped_and_say_so() -> None:
    done = DEFAULT.done()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch is not installed" in done.stdout
    assert "passed" not in done.stdout


def test_an_import_of_torch_would_be_seen() -> None:
    done = NEEDY.done()
    assert done.returncode == 2
    assert "No module named 'torch'" in done.stderr
