"""Commands that take seconds, begun long before the test that asks what came of them.

The suite is one process, and a second core is there. ``@pytest.mark.ahead(job)`` lets a job run
beside the tests before, one job at a time; conftest.py puts the tests so marked at the end.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
Command = Sequence[object]  # what follows ``python``


class Job:
    """One command; ``make`` writes what it needs into its folder, and returns it."""

    def __init__(self, make: Callable[[Path], Command], in_folder: bool = False) -> None:
        self._make, self._in_folder = make, in_folder
        self._process: subprocess.Popen[str] | None = None
        self._kept: tempfile.TemporaryDirectory[str] | None = None

    @property
    def folder(self) -> Path:
        """Where its files are: the command's, and what it said."""
        self._kept = self._kept or tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return Path(self._kept.name)

    def begin(self) -> None:
        """Start it, if it was not."""
        if self.is_begun():
            return
        command = [sys.executable, *map(str, self._make(self.folder))]
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {
            "PYTHONPATH": os.pathsep.join(places),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder if self._in_folder else ROOT,
                stdout=out,
                stderr=err,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | given,
            )

    def is_begun(self) -> bool:
        """Return whether it was started."""
        return self._process is not None

    def is_running(self) -> bool:
        """Return whether it was begun and has not ended."""
        return self._process is not None and self._process.poll() is None

    def done(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; return what it said."""
        self.begin()
        assert self._process is not None
        code = self._process.wait()
        said = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self._process.args, code, *said)

    def end(self) -> None:
        """Stop it where nobody waits for it any more, and remove its files."""
        if self.is_running():
            assert self._process is not None
            self._process.terminate()
            self._process.wait()
        if self._kept is not None:
            self._kept.cleanup()


class Queue:
    """Jobs in the order of their tests, of which one runs at a time."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def fill(self, jobs: Iterable[Job]) -> None:
        """Take the jobs of a session's tests, and begin the first."""
        self.jobs = list(dict.fromkeys(jobs))
        self.go_on()

    def go_on(self) -> None:
        """Begin the next job, if none is running."""
        if not any(job.is_running() for job in self.jobs):
            for job in self.jobs:
                if not job.is_begun():
                    job.begin()
                    return

    def end(self) -> None:
        """Leave no process and no file behind."""
        for job in self.jobs:
            job.end()


QUEUE = Queue()
