"""Check a port's traces of the golden vectors: one file for each case, NAME.safetensors.

Needs NumPy and safetensors, no PyTorch.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_parity.comparison.trace_file import TraceFile
from reference_np.config import InputError
from reference_np.ops import Array
from reference_np.weight_files import load_json

from .reading import relative_error

FORMAT, SCHEMA_VERSION = "llama-vectors", 1
INDEX = "index.json"
VECTORS = Path(__file__).parent
# The files that a copy has; readers in other languages are among them.
COPIED = (INDEX, "index.txt", "vectors.schema.json", "models", "traces", "readers")
ANGLES = 4  # the place in a row of bounds of the allowance for angles in float32
# One of them must be in the trace for each call, and for each step.
ENOUGH = {"call": ("logits", "target_logprobs"), "step": ("loss",)}


class Verdict(NamedTuple):
    """What came of one case: "passed", "failed" or "not covered", and why."""

    case: str
    status: str
    reason: str
    flags: Sequence[str]  # the known bugs that a failure may be
    share: float = 0.0  # of its bound, the largest

    def line(self) -> str:
        """Return the verdict as one line."""
        bugs = f" [{', '.join(self.flags)}]" if self.status == "failed" else ""
        return f"{self.status:11} {self.case}: {self.reason}{bugs}"


def load_index(folder: Path = VECTORS) -> dict[str, Any]:
    """Return the index of a folder of vectors; InputError for none, and for another version."""
    path = folder / INDEX
    index = load_json(path)
    if index.get("format") != FORMAT:
        raise InputError(f"{path}: is no index of golden vectors; give a folder that has one")
    version = index.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: its schema version is {version!r}, and this release reads {SCHEMA_VERSION}; "
            "install the release that wrote it, or copy this one's vectors"
        )
    return index


def list_cases(folder: Path = VECTORS) -> list[str]:
    """Return a line for each case: its name, what it needs, and a sentence."""
    cases = load_index(folder)["cases"]
    width = max(len(case["id"]) for case in cases)
    return [
        f"{case['id']:{width}}  {case['about']}"
        + (f" (needs {', '.join(case['needs'])})" if case["needs"] else "")
        for case in cases
    ]


def copy_vectors(target: Path, folder: Path = VECTORS) -> int:
    """Copy the vectors into a new or empty folder; return the number of cases."""
    index = load_index(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is there already; give a new or empty folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            source = folder / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copyfile(source, target / name)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return len(index["cases"])


def check(traces: Path, float32_angles: bool = False, folder: Path = VECTORS) -> list[Verdict]:
    """Compare a port's traces with the expected ones; return a verdict for each case.

    ``float32_angles``: the port multiplies position and frequency in float32. Raises InputError
    where ``traces`` is no folder or has no trace of a case, and for a file that is no trace.
    """
    index = load_index(folder)
    if not traces.is_dir():
        raise InputError(f"{traces}: no such folder; give one with a trace NAME.safetensors a case")
    if not any((traces / f"{case['id']}.safetensors").is_file() for case in index["cases"]):
        raise InputError(
            f"{traces}: has no trace of a case, as {index['cases'][0]['id']}.safetensors; "
            "the cases' names are in the index"
        )
    return [_check_case(index, case, traces, float32_angles, folder) for case in index["cases"]]


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Return 1 where a case failed, else 0."""
    return int(any(verdict.status == "failed" for verdict in verdicts))


def report(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the lines of failures and of what is not covered, and a summary."""
    by_status: dict[str, list[Verdict]] = {"failed": [], "not covered": [], "passed": []}
    for verdict in verdicts:
        by_status[verdict.status].append(verdict)
    counts = ", ".join(f"{len(found)} {status}" for status, found in by_status.items())
    lines = [verdict.line() for verdict in (*by_status["failed"], *by_status["not covered"])]
    return [*lines, f"{len(verdicts)} cases: {counts}"]


def _check_case(
    index: Mapping[str, Any],
    case: Mapping[str, Any],
    traces: Path,
    float32_angles: bool,
    folder: Path,
) -> Verdict:
    path = traces / f"{case['id']}.safetensors"
    if not path.is_file():
        # A basic case asks for nothing that a Llama could lack.
        status = "failed" if case["basic"] else "not covered"
        return Verdict(case["id"], status, "no trace", ())
    theirs, ours = TraceFile(path), TraceFile(folder / case["trace"])
    if wrong := _other_inputs(theirs, ours):
        return Verdict(case["id"], "failed", f"{wrong}: run the case's own inputs", ())
    column = index["precisions"].index(theirs.dtype)
    worst, tensor, compared = 0.0, "", 0
    flags = case["flags"] + (case["flags_float64_only"] if column == 0 else [])
    for name, bounds in case["bounds"].items():
        if bounds[column] is None or (found := _read(theirs, name)) is None:
            continue
        expected = _read(ours, name)
        assert expected is not None
        if found.shape != expected.shape:
            reason = f"{name} has the shape {found.shape}, not {expected.shape}"
            return Verdict(case["id"], "failed", reason, flags, math.inf)
        bound = bounds[column] + (bounds[ANGLES] if float32_angles else 0.0)
        share = relative_error(_real(case, name, found), _real(case, name, expected)) / bound
        compared += 1
        if share > worst or not tensor:
            worst, tensor = share, name
    if not compared:
        return Verdict(case["id"], "not covered", f"not judged in {theirs.dtype}", ())
    if missing := next(_missing(case, theirs), None):
        return Verdict(case["id"], "failed", f"{missing} is missing", ())
    reason = f"{tensor} at {worst:.2g} of its bound, {compared} of {len(case['bounds'])} tensors"
    return Verdict(case["id"], "failed" if worst > 1 else "passed", reason, flags, worst)


def _read(trace: TraceFile, name: str) -> Array | None:
    kind, at, rest = name.split(".", 2)
    index = int(at)
    return trace.read(index, rest) if kind == "call" else trace.read_step(index, rest)


def _real(case: Mapping[str, Any], name: str, value: Array) -> Array:
    """Return the elements that are judged: padding's are not."""
    kind, index, _ = name.split(".", 2)
    ranges = case["real"][int(index)] if kind == "call" else None
    if ranges is None:
        return value
    rows = [row[first:end] for row, (first, end) in zip(value, ranges, strict=True)]
    return np.concatenate(rows)


def _missing(case: Mapping[str, Any], theirs: TraceFile) -> Iterator[str]:
    """Yield the result that each call and step without any should have."""
    parts = {tuple(name.split(".", 2)[:2]) for name in case["bounds"]}
    for kind, at in sorted(parts):
        names = [f"{kind}.{at}.{rest}" for rest in ENOUGH[kind]]
        if not any(_read(theirs, name) is not None for name in names):
            yield names[0]


def _other_inputs(theirs: TraceFile, ours: TraceFile) -> str:
    """Return how a trace's inputs differ from the case's, "" where they do not."""
    if len(theirs.calls) != len(ours.calls) or len(theirs.steps) != len(ours.steps):
        return (
            f"it has {len(theirs.calls)} calls and {len(theirs.steps)} steps, "
            f"not {len(ours.calls)} and {len(ours.steps)}"
        )
    for c, (mine, yours) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        if not np.array_equal(mine.tokens, yours.tokens) or mine.after != yours.after:
            return f"call {c} has other tokens, or continues another call"
    for s, (step, their_step) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        if len(step.batches) != len(their_step.batches):
            return f"step {s} has another number of micro-batches"
        for one, other in zip(step.batches, their_step.batches, strict=True):
            if not all(np.array_equal(one[i], other[i]) for i in (0, 1)):
                return f"step {s} has other tokens or targets"
    return ""
