"""The command llama-parity in a porter's folder, whose own settings would break pytest."""

from pathlib import Path

from .jobs import Command, Job

QUICK = "--profile", "quick", "-n", "0"
HOSTILE = {
    "pytest.ini": "[pytest]\naddopts = --no-such-flag\nfilterwarnings = error\n",
    "conftest.py": "raise RuntimeError('the porter's conftest')\n",
    "test_mine.py": "def test_mine():\n    raise RuntimeError('not to be collected')\n",
    "mine.py": (
        "import warnings\n"
        "from parity_tests.suite.toy_ports import Small, SmallWithTiledHeads\n"
        "warnings.warn('old', DeprecationWarning)\n"
        "__version__ = '1.2'\n"
        "class Interrupted(Small):\n"
        "    def logits(self, *arguments):\n"
        "        raise KeyboardInterrupt\n"
        "class OfDirectories:\n"
        "    def from_directory(self, *arguments):\n"
        "        raise NotImplementedError('later')\n"
    ),
    "xfails.txt": "\ufefftest_logits  # tiled\n# a comment\n\ntest_logits_in[float32] # too\n"
    "test_long_logits\n",
    "all.txt": "test_*logits* # all\n",
    "every.txt": "test_* # for now\n",
    "stale.txt": "test_*logits* # all\ntest_trace # later\ntest_training[1]\ntest_pa*ing # no\n",
    "wrong.txt": "test_logits\ntest_logits_in[flot32]\n",
}


def in_folder(*arguments: str) -> Job:
    """Return a run of the command in a porter's folder, beside the porter's settings."""

    def make(folder: Path) -> Command:
        for name, text in HOSTILE.items():
            (folder / name).write_text(text)
        return "-c", WITH_HOSTILE_VARIABLES, *arguments

    return Job(make, in_folder=True)


WITH_HOSTILE_VARIABLES = """
import os, sys
os.environ.update(PYTEST_ADDOPTS="--no-such-flag", PYTEST_PLUGINS="no_such_module")
from llama_parity.command.main import main
sys.exit(main())
"""
