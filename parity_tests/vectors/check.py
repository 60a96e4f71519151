"""Check a port's traces of the golden vectors: one file for each case, NAME.safetensors.

Needs NumPy and safetensors, no PyTorch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_parity.comparison.logprobs import at_targets
from llama_parity.comparison.trace_file import TraceFile
from llama_parity.comparison.trace_format import LOGPROBS
from reference_np.config import InputError
from reference_np.ops import Array

from .folder import VECTORS, load_index
from .inputs import other_inputs, other_settings
from .reading import real_tokens, relative_error

ANGLES = 4  # the place in a row of bounds of the allowance for angles in float32
# What a case may need: the third part of the names of the results that show it, and a word.
SHOWN_BY = {"gradients": ("grad", "gradients"), "optimizer": ("param", "updated parameters")}


class Verdict(NamedTuple):
    """What came of one case: "passed", "failed" or "not covered", and why."""

    case: str
    status: str
    reason: str
    flags: Sequence[str] = ()  # the known bugs that a failure may be
    share: float = 0.0  # of its bound, the largest

    def line(self) -> str:
        """Return the verdict as one line."""
        bugs = f" [{', '.join(self.flags)}]" if self.status == "failed" and self.flags else ""
        return f"{self.status:11} {self.case}: {self.reason}{bugs}"


def check(traces: Path, float32_angles: bool = False, folder: Path = VECTORS) -> list[Verdict]:
    """Compare a port's traces with the expected ones; return a verdict for each case.

    ``float32_angles``: the port multiplies position and frequency in float32. A file that is no
    trace fails its case. Raises InputError where ``traces`` is no folder or has no trace of a case.
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
        return Verdict(case["id"], "failed" if case["basic"] else "not covered", "no trace")
    ours = TraceFile(folder / case["trace"])
    try:
        theirs = TraceFile(path)
        if wrong := other_inputs(theirs, ours, case["real"]):
            return Verdict(case["id"], "failed", f"{wrong}: run the case's own inputs")
        return _judge(case, theirs, ours, index["precisions"].index(theirs.dtype), float32_angles)
    except InputError as error:  # no trace, or one that contradicts itself
        return Verdict(case["id"], "failed", str(error))


def _judge(
    case: Mapping[str, Any], theirs: TraceFile, ours: TraceFile, column: int, float32_angles: bool
) -> Verdict:
    """Return the verdict on a trace of the case's own inputs."""
    flags = case["flags"] + (case["flags_float64_only"] if column == 0 else [])
    judged = {name: row for name, row in case["bounds"].items() if row[column] is not None}
    if not judged:
        return Verdict(case["id"], "not covered", f"not judged in {theirs.dtype}")
    worst, tensor, shown = 0.0, "", []
    for name, row in judged.items():
        if (found := _read(theirs, name)) is None:
            continue
        expected = _read(ours, name)
        assert expected is not None
        if found.shape != expected.shape:
            reason = f"{name} has the shape {found.shape}, not {expected.shape}"
            return Verdict(case["id"], "failed", reason, flags, math.inf)
        bound = row[column] + (row[ANGLES] if float32_angles else 0.0)
        share = relative_error(*(_judged(case, ours, name, x) for x in (found, expected))) / bound
        shown.append(name)
        if share > worst or not tensor:
            worst, tensor = share, name
    reason = f"{tensor} at {worst:.2g} of its bound, {len(shown)} of {len(case['bounds'])} tensors"
    if worst > 1:
        reason += other_settings(theirs, ours)
        return Verdict(case["id"], "failed", reason, flags, worst)
    return _incomplete(case, shown) or Verdict(case["id"], "passed", reason, flags, worst)


def _read(trace: TraceFile, name: str) -> Array | None:
    kind, at, rest = name.split(".", 2)
    index = int(at)
    return trace.read(index, rest) if kind == "call" else trace.read_step(index, rest)


def _judged(case: Mapping[str, Any], ours: TraceFile, name: str, value: Array) -> Array:
    """Return the elements that are judged: not padding's, nor those of no target."""
    kind, at, rest = name.split(".", 2)
    if kind == "call" and rest == LOGPROBS:
        targets = ours.calls[int(at)].targets
        assert targets is not None
        value = at_targets(value, targets)
    return real_tokens(case["real"], name, value)


def _incomplete(case: Mapping[str, Any], shown: Sequence[str]) -> Verdict | None:
    """Return the verdict where a trace lacks what its case asks for; None where it is all there.

    Each call's logits or log-probabilities and each step's loss are required. A trace that shows
    none of what the case ``needs``, of a port that has no gradients say, does not cover the case;
    one that shows a part of it fails.
    """
    required = {
        need: [n for n in case["bounds"] if n.split(".")[2] == kind]
        for need, (kind, _) in SHOWN_BY.items()
        if need in case["needs"]
    }
    outputs: dict[str, list[str]] = {}
    for name in case["bounds"]:
        kind, at, rest = name.split(".", 2)
        if rest in ("logits", LOGPROBS, "loss"):
            outputs.setdefault(f"{kind}.{at}", []).append(name)
    missing = [names[0] for names in outputs.values() if not {*names} & {*shown}]
    unseen = []
    for need, names in required.items():
        lacking = [name for name in names if name not in shown]
        if len(lacking) == len(names):
            unseen.append(SHOWN_BY[need][1])
        else:
            missing += lacking
    if missing:
        return Verdict(case["id"], "failed", f"{missing[0]} is missing")
    if unseen:
        return Verdict(case["id"], "not covered", f"the trace shows no {' and no '.join(unseen)}")
    return None
