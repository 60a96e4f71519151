"""Search for inputs that a reader fails on, guided by the lines they reach, with Atheris.

::

    pip install atheris==3.1.0   # on Python 3.11: 3.0.0
    python -m parity_tests.fuzz.coverage_guided all --seconds 600 --processes 16 --new /tmp/units
    python -m parity_tests.fuzz.coverage_guided all --keep /tmp/units

The first prints one line of JSON for each target; its exit code is 1 where a reader failed. The
second copies to ``corpus/`` the units that reach a line that no kept one reaches, smallest first.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parent.parent.parent
NAMES = ("config", "header", "index", "trace", "toml", "tokenizer", "pieces", "shard_index")
LARGEST = 4096  # bytes of a unit
# Python modules whose lines guide the search: the readers, and TOML's, which is in Python too.
GUIDING = ["reference_np", "llama_common", "llama_torch", "llama_parity", "tomllib"]
PICKLES = ("shard_index",)
DEEP = re.compile(rb'(?:[\[{]\s*(?:"[^"]*"\s*:\s*)?){50}')
GRACE = 60  # seconds after the end until a process that goes on is killed
STARTS = 20  # of a process, which a failing unit ends
Arc = tuple[str, int, int]  # a file, and two lines run in succession
PROGRESS = re.compile(r"^#(\d+)\s.* cov: (\d+) ft: (\d+)", re.MULTILINE)
ERROR = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*|==\d+== ?ERROR.*)", re.MULTILINE
)
FAILURE = "failure-"  # how the names of units begin that a reader failed on


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where a reader failed on a unit."""
    flags = _flags(argv)
    names = NAMES if flags.target == "all" else (flags.target,)
    if flags.work:
        work(flags.target, flags.new, flags.seconds, flags.seed)
    elif flags.keep:
        for name in names:
            print(json.dumps({"target": name, "kept": keep(name, flags.keep / name)}), flush=True)
    else:
        return search(names, flags)
    return 0


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", choices=["all", *NAMES])
    parser.add_argument("--seconds", type=int, default=60, help="time of the search (60)")
    parser.add_argument(
        "--processes", type=int, default=1, help="in total, at least 1 a target (1)"
    )
    parser.add_argument("--new", type=Path, help="folder for new units and failures (temporary)")
    parser.add_argument("--keep", type=Path, help="do not search; keep units of this folder")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help="of the first process (1)")
    return parser.parse_args(argv)


def search(names: Sequence[str], flags: argparse.Namespace) -> int:
    """Search in all targets at once; print one line of JSON for each."""
    new = (flags.new or Path(tempfile.mkdtemp(prefix="units-"))).resolve()
    each, end = max(1, flags.processes // len(names)), time.monotonic() + flags.seconds
    workers = [Worker(name, new / name, flags.seed + i) for name in names for i in range(each)]
    while sum(worker.goes_on(end) for worker in workers):  # asks each
        time.sleep(0.5)
    lines = [_summary([w for w in workers if w.name == name], flags.seconds) for name in names]
    for line in lines:
        print(json.dumps(line), flush=True)
    return 1 if any(line["failures"] or not line["executions"] for line in lines) else 0


def _summary(workers: Sequence["Worker"], seconds: int) -> dict[str, Any]:
    """Return what the processes of one target did: units run, edges and features, failures."""
    folder, logs = workers[0].folder, [log for worker in workers for log in worker.texts()]
    progress = [[tuple(map(int, found)) for found in PROGRESS.findall(log)] for log in logs]
    failing = [path for path in folder.iterdir() if path.name.startswith(FAILURE)]
    return {
        "target": workers[0].name,
        "processes": len(workers),
        "seconds": seconds,
        "executions": sum(found[-1][0] for found in progress if found),
        "edges": max((edges for found in progress for _, edges, _ in found), default=0),
        "features": max((features for found in progress for _, _, features in found), default=0),
        "new_units": len(list(folder.iterdir())) - len(failing),
        "failures": sum(bool(ERROR.search(log)) for log in logs),
        "failing_units": len(failing),
        "errors": sorted({line[:300] for log in logs for line in ERROR.findall(log)})[:20],
        "folder": str(folder),
    }


class Worker:
    """A process that searches in one target, begun again after each unit that ends it."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.seed = name, folder, seed
        self.logs: list[Path] = []
        self.process: subprocess.Popen[bytes] | None = None

    def goes_on(self, end: float) -> bool:
        """Begin the process where it is to run; return whether it runs."""
        if self.process is not None and self.process.poll() is None:
            if time.monotonic() > end + GRACE:
                self.process.kill()
            return True
        is_done = self.process is not None and self.process.returncode == 0
        left = int(end - time.monotonic())
        if left < 1 or is_done or len(self.logs) >= STARTS:
            return False
        self.logs.append(Path(tempfile.mkstemp(prefix=f"{self.name}-", suffix=".log")[1]))
        seed = self.seed + 1000 * len(self.logs)  # not the way to the same failure
        command = [sys.executable, "-m", "parity_tests.fuzz.coverage_guided", self.name, "--work"]
        command += ["--seconds", str(left), "--seed", str(seed), "--new", str(self.folder)]
        with self.logs[-1].open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        return True

    def texts(self) -> list[str]:
        """Return what its processes printed."""
        return [log.read_text(errors="replace") for log in self.logs]


def work(name: str, new: Path, seconds: int, seed: int) -> None:
    """Search in this process, until a unit fails or the time is over; exits the process."""
    import atheris

    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    with atheris.instrument_imports(include=GUIDING):
        from .targets import TARGETS, run_unit

        target = TARGETS[name]
        target.prepare(folder)

    def mutate(unit: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        try:
            if random.randrange(3):
                return target.mutate(random, unit)[:max_size]
        except Exception:  # not of the format any more
            pass
        return bytes(atheris.Mutate(unit, max_size))

    flags = [f"-max_total_time={seconds}", f"-artifact_prefix={new}/{FAILURE}", f"-seed={seed}"]
    flags += [f"-max_len={LARGEST}", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    arguments = [sys.argv[0], str(new), str(CORPUS / name), *flags]
    atheris.Setup(arguments, partial(run_unit, target, folder), custom_mutator=mutate)
    atheris.Fuzz()


def is_harmless(name: str, unit: bytes) -> bool:
    """Return whether a unit may be kept: other programs read it without harm.

    A mutated pickle may ask pickle for gigabytes, and brackets in brackets fill a parser's stack.
    """
    return name not in PICKLES and not DEEP.search(unit)


def keep(name: str, new: Path) -> int:
    """Copy to the corpus the harmless units that reach new lines; return how many."""
    from .targets import TARGETS, run_unit

    target, reached, n = TARGETS[name], set[Arc](), 0
    units = [path for path in new.iterdir() if not path.name.startswith(FAILURE)]
    with tempfile.TemporaryDirectory() as scratch:
        target.prepare(Path(scratch))
        run = partial(run_unit, target, Path(scratch))
        for path in (CORPUS / name).iterdir():
            reached |= arcs(partial(run, path.read_bytes()))
        for path in sorted(units, key=lambda path: (path.stat().st_size, path.name)):
            unit = path.read_bytes()
            if len(unit) > LARGEST or not is_harmless(name, unit):
                continue
            if not (found := arcs(partial(run, unit))) <= reached:
                reached |= found
                n += 1
                kept = CORPUS / name / hashlib.sha256(unit).hexdigest()[:16]
                kept.write_bytes(unit)
    return n


def arcs(run: Callable[[], None]) -> set[Arc]:
    """Return the pairs of successive lines of the readers' files that ``run`` goes through."""
    found: set[Arc] = set()
    tops = tuple(str(ROOT / package) for package in GUIDING)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(tops):
            return None
        before = frame.f_lineno

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            found.add((name, before, frame.f_lineno))
            before = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return found


if __name__ == "__main__":
    sys.exit(main())
