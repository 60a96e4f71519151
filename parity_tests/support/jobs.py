"""Commands that several tests ask about, run once in a process of their own."""

import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

Command = Sequence[object]  # what follows ``python``


def torchrun_command(
    world: int, *arguments: object, more: Sequence[str] = (), forks: bool = False
) -> tuple[object, ...]:
    """Return what follows ``python``; torchrun's processes may share their imports as forks."""
    run = "parity_tests.workers.torchrun" if forks else "torch.distributed.run"
    return "-m", run, "--standalone", *more, "--nproc-per-node", world, "-m", *arguments


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what pytest and its plug-ins put there."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return kept | more


class Job:
    """One command; ``make`` writes what it needs into its folder, and returns it."""

    def __init__(self, make: Callable[[Path], Command], in_folder: bool = False) -> None:
        self._make, self._in_folder = make, in_folder
        self._done: subprocess.CompletedProcess[str] | None = None
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of its files, which is removed when the job goes."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def done(self) -> subprocess.CompletedProcess[str]:
        """Return what the command said, after running it if nobody has."""
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
    """Return what follows ``python`` where nothing is asked of torchrun itself; quicker."""
    return "-m", "parity_tests.workers.launch", world, *arguments
