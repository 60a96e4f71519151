"""Subprocesses whose results several tests check, each run once."""

import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

Command = Sequence[object]  # the arguments of ``python``


def torchrun_command(
    world: int, *arguments: object, more: Sequence[str] = (), forks: bool = False
) -> tuple[object, ...]:
    """Return the arguments of ``python`` that run a module under torchrun on ``world`` processes.

    ``more`` are torchrun's flags; with ``forks`` its processes are forks of one that has imported
    the module (workers/torchrun.py).
    """
    run = "parity_tests.workers.torchrun" if forks else "torch.distributed.run"
    return "-m", run, "--standalone", *more, "--nproc-per-node", world, "-m", *arguments


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without pytest's variables, and with ``more``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return kept | more


class Job:
    """One Python command, run once; ``make`` writes its input files into a folder and returns it.

    With ``in_folder`` it runs in that folder, else in the repository's root.
    """

    def __init__(self, make: Callable[[Path], Command], in_folder: bool = False) -> None:
        self._make, self._in_folder = make, in_folder
        self._done: subprocess.CompletedProcess[str] | None = None
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of its files, which is removed with the job."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def done(self) -> subprocess.CompletedProcess[str]:
        """Return the ended process, its exit code and output; the first call runs it."""
        if self._done is None:
            places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._done = subprocess.run(
                [sys.executable, *map(str, self._make(self.folder))],
                cwd=self.folder if self._in_folder else ROOT,
                env=environment(
                    OMP_NUM_THREADS="1",
                    PYTHONPATH=os.pathsep.join(places),
                    XDG_CACHE_HOME=str(self.folder / "cache"),
                ),
                capture_output=True,
                text=True,
                check=False,
            )
        return self._done


def launch_command(world: int, *arguments: object) -> tuple[object, ...]:
    """Return the arguments of ``python`` that run a module on ``world`` processes of one job.

    Quicker than torchrun, for tests that need neither its restarts nor its signals.
    """
    return "-m", "parity_tests.workers.launch", world, *arguments
