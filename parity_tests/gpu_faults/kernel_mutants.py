"""Plant each fault of gpu_faults in a copy of the program and see a test fail, on a GPU.

    python -m parity_tests.gpu_faults.kernel_mutants [--only NAME ...] [--seconds N] [--processes N]

The tests run on the program as it is, first: one that fails there kills nothing, and is an error.
What Triton compiled for that, every copy begins with. On a machine without a GPU, ``--cpu`` plants
what Triton's interpreter and recordings of graphs can show (see test_kernels.py, which needs
triton, and test_cuda_graphs.py). Exits with 1 where a fault survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "llama_torch"
COPIED = (
    *("llama_common", "llama_parity", "llama_torch", "reference_np"),
    *("parity_tests", "tools", "conftest.py", "pyproject.toml"),
)
FILES = ("parity_tests/model/test_kernels.py", "parity_tests/inference/test_cuda_graphs.py")
# The tests, in parts that run side by side; between them they are all.
PARTS = (
    "one_sequence and (one_tile or whole)",
    "one_sequence and not (one_tile or whole)",
    "several_sequences and float64",
    "several_sequences and not float64",
    "attention or one_kernel or pieces",
    "not (one_sequence or several_sequences or attention or one_kernel or pieces)",
)
# Seconds for the tests of one fault, on a GPU and interpreted: a fault may hang a kernel.
LIMIT, LIMIT_CPU = 150, 600
# pytest's exit codes: a test failed; the files cannot be read, the options, no test is selected.
FAILED, NOTHING_RAN = 1, (2, 4, 5)


WORDS = {
    "FAILED": "killed by a test",
    "CRASHED": "killed: crashed",
    "TIMED OUT": "killed: timed out",
    "PASSED": "SURVIVED",
    "NOT RUN": "NOT RUN",
}


class Outcome(NamedTuple):
    """What the tests made of one program."""

    verdict: str  # PASSED, FAILED, CRASHED, TIMED OUT or NOT RUN
    detail: str  # the first test that failed, or the last line of output
    seconds: float
    output: str = ""


def mutated(fault: Fault, text: str) -> str:
    """Return a file's text with the fault in it; ValueError unless its place is there once."""
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: its place is {text.count(fault.old)} times in the file")
    return text.replace(fault.old, fault.new)


def copy_program(folder: Path, fault: Fault | None) -> None:
    """Copy what the tests need into ``folder``, with a fault in it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    if fault:
        path = folder / "llama_torch" / fault.file
        path.write_text(mutated(fault, path.read_text()))


def run_tests(folder: Path, options: list[str], cache: Path, on_cpu: bool, limit: float) -> Outcome:
    """Run those tests of FILES that pytest's options select, in a process of their own."""
    start = time.monotonic()
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
    }
    if on_cpu:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Warnings are errors in the suite; a version of something here may have others.
    command += ["-W", "default", "--tb=short", *options, *FILES]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=limit, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        verdict = "NOT RUN" if on_cpu else "TIMED OUT"  # the interpreter is slow by itself
        return Outcome(verdict, f"stopped after {limit:.0f} s", time.monotonic() - start)
    has_run = re.search(r"\d (passed|failed)", done.stdout)
    verdict = {0: "PASSED", FAILED: "FAILED"}.get(done.returncode, "CRASHED")
    if done.returncode in NOTHING_RAN or (verdict != "CRASHED" and not has_run):
        verdict = "NOT RUN"
    failed = re.search(r"^FAILED [^:]*::(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    last = (done.stdout + done.stderr).strip().rpartition("\n")[2]
    detail = failed[1] if failed and verdict == "FAILED" else last
    return Outcome(verdict, detail, time.monotonic() - start, done.stdout + done.stderr)


class Runner:
    """Runs of one catalogue, several at a time, within a number of seconds."""

    def __init__(self, work: Path, seconds: float, processes: int, on_cpu: bool) -> None:
        self.work, self.on_cpu, self.processes = work, on_cpu, processes
        self.end = time.monotonic() + seconds
        self.cache = work / "cache"
        self.cache.mkdir()
        self.broken: list[str] = []  # tests that fail on the unchanged program

    def baseline(self, parts: Sequence[str]) -> None:
        """Run the unchanged program's tests, and fill the cache; say what failed."""
        folder = self.work / "unchanged"
        folder.mkdir()
        copy_program(folder, None)

        def run(part: str) -> Outcome:
            left = self.end - time.monotonic()
            return run_tests(folder, ["-k", part], self.cache, self.on_cpu, left)

        with ThreadPoolExecutor(self.processes) as pool:
            outcomes = list(pool.map(run, parts))
        for part, outcome in zip(parts, outcomes, strict=True):
            print(f"unchanged  {outcome.verdict:<9} {outcome.seconds:5.0f} s  {part}", flush=True)
            if outcome.verdict != "PASSED":
                print(outcome.output[-6000:] or outcome.detail, flush=True)
                failed = re.findall(r"^FAILED (.+?)(?: - |$)", outcome.output, re.MULTILINE)
                self.broken += failed or [f"-k {part!r}: {outcome.detail}"]

    def plant_all(self, faults: list[Fault]) -> list[Outcome]:
        """Return what became of each fault."""
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(self._plant, faults))

    def _plant(self, fault: Fault) -> Outcome:
        if time.monotonic() > self.end:
            outcome = Outcome("NOT RUN", "no time was left", 0.0)
        else:
            with tempfile.TemporaryDirectory(dir=self.work) as name:
                folder = Path(name)
                copy_program(folder, fault)
                cache = shutil.copytree(self.cache, folder / "cache")
                options = ["-x", "-k", fault.tests]
                options += [f"--deselect={test}" for test in self.broken]
                most = LIMIT_CPU if self.on_cpu else LIMIT
                limit = max(10.0, min(most, self.end - time.monotonic()))
                outcome = run_tests(folder, options, cache, self.on_cpu, limit)
        print(f"{described(outcome)}  {fault.file}: {fault.name}", flush=True)
        return outcome


def described(outcome: Outcome) -> str:
    """Return one line of a table."""
    how = WORDS[outcome.verdict]
    return f"{how:<17} {outcome.seconds:4.0f} s  {outcome.detail[:70]:<70}"


def summarise(faults: list[Fault], outcomes: list[Outcome]) -> int:
    """Print what survived, and how many did not; return the exit code."""
    pairs = list(zip(faults, outcomes, strict=True))
    print(f"\n{len(pairs)} faults")
    for kind, words in WORDS.items():
        found = [fault for fault, outcome in pairs if outcome.verdict == kind]
        print(f"{len(found):4} {words}")
        if kind != "FAILED":
            for fault in found:
                print(f"       {fault.file}: {fault.name} ({fault.wrong})")
    return int(any(outcome.verdict in ("PASSED", "NOT RUN") for outcome in outcomes))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="part of its file or name")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after these")
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--cpu", action="store_true", help="interpret the kernels, record graphs")
    given = parser.parse_args()
    wanted = given.only or [""]
    faults = [f for f in FAULTS if any(word in f"{f.file}: {f.name}" for word in wanted)]
    faults = [f for f in faults if not (given.cpu and f.only_gpu)]
    if not faults:
        parser.error(f"no fault has {' or '.join(wanted)} in its name")
    parts: Sequence[str] = PARTS
    if given.only or given.cpu:  # what these need, and no more
        parts = (" or ".join(f"({tests})" for tests in {fault.tests for fault in faults}),)
    with tempfile.TemporaryDirectory() as name:
        runner = Runner(Path(name), given.seconds, given.processes, given.cpu)
        runner.baseline(parts)
        code = summarise(faults, runner.plant_all(faults))
        for test in runner.broken:
            print(f"fails on the unchanged program: {test}")
        return max(code, int(bool(runner.broken)))


if __name__ == "__main__":
    sys.exit(main())
