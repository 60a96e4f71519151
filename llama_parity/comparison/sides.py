"""The other side of a comparison, and the recording of its activations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits
from reference_np.naming import activation_axes

from .logprobs import has_targets, with_targets
from .padding import find_padding
from .trace_file import TraceFile, TraceWriter, write_trace
from .trace_format import LOGPROBS, Call

Advance = Callable[[], None]
LOGPROBS_ALONE = "log-probabilities"  # of given targets alone: how much of a call a trace covers
LAST_LOGITS = "next-token logits"  # of a call's last tokens alone: of an engine
NOT_COVERED = "not covered"
NO_OUTPUT = f"{NOT_COVERED}: the trace has no output of it"
NO_TARGET = f"{NOT_COVERED}: its log-probabilities are of no target; write its targets"
BY_DECLARATION = f"{NOT_COVERED}: all its targets are -100"


class Side(NamedTuple):
    """The implementation that the oracle is compared with, or a trace that it left."""

    title: str
    dtype: str
    # Runs every call and writes its activations; returns each call's coverage: "activations",
    # "logits" (of those alone), ``LAST_LOGITS``, or "not covered: " and why. None where there is a
    # trace, which may cover ``LOGPROBS_ALONE``.
    write: Callable[[TraceWriter, Sequence[Call], LlamaConfig, Advance], list[str]] | None
    trace: TraceFile | None = None
    backend: Any = None  # for --grads: the name of a backend, as ``reference_np.backend`` loads it
    weights: Path | None = None  # a checkpoint, where it is not the oracle's
    limits: Limits = UNLIMITED  # of a backend that declares them
    # Methods that a backend offers and ``write`` did not call; ``write`` fills the list.
    uncalled: Sequence[str] = ()


class Recording(NamedTuple):
    """The other side's activations, and the coverage of every call."""

    trace: TraceFile
    coverage: list[str]


def is_covered(coverage: str) -> bool:
    """Return whether the other side offers an output of a call of this coverage."""
    return not coverage.startswith(NOT_COVERED)


def is_lost(coverage: str) -> bool:
    """Return whether a trace declares a call of this coverage and has nothing to judge of it."""
    return coverage in (NO_OUTPUT, NO_TARGET)


def trace_coverage(trace: TraceFile) -> list[str]:
    """Return the coverage of each call of a trace.

    Of a file of version 1 everything is expected. A call whose targets are given and all stand for
    none declares that it shows nothing: it fills the cache for others.
    """
    judged = with_targets(trace.calls, find_padding(trace.calls))
    coverage = []
    for c, call in enumerate(trace.calls):
        names = [name for name in activation_axes(trace.config) if trace.has(c, name)]
        if trace.version == "1" or set(names) - {"logits"}:
            coverage.append("activations")
        elif names:
            coverage.append("logits")
        elif call.targets is not None and not has_targets(call):
            coverage.append(BY_DECLARATION)
        elif not trace.has(c, LOGPROBS):
            coverage.append(NO_OUTPUT)
        else:
            coverage.append(LOGPROBS_ALONE if has_targets(judged[c]) else NO_TARGET)
    return coverage


def record(
    side: Side, calls: Sequence[Call], config: LlamaConfig, folder: Path, advance: Advance
) -> Recording:
    """Run the other side on every call, with ``config.n_layers`` layers; record it in ``folder``.

    ``advance`` is called once for every layer of every call.
    """
    if side.write is None:
        assert side.trace is not None
        return Recording(side.trace, trace_coverage(side.trace))
    coverage: list[str] = []
    path = folder / "recording.safetensors"
    write = side.write
    write_trace(
        path,
        config,
        calls,
        side.dtype,
        lambda writer: coverage.extend(write(writer, calls, config, advance)),
    )
    return Recording(TraceFile(path), coverage)
