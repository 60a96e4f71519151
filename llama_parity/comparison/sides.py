"""The other side of a comparison, and the recording of its activations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits
from reference_np.naming import activation_axes
from reference_np.ops import IGNORE

from .logprobs import given_targets
from .trace_file import TraceFile, TraceWriter, write_trace
from .trace_format import LOGPROBS, Call

Advance = Callable[[], None]
LOGPROBS_ALONE = "log-probabilities"  # of given targets alone: how much of a call a trace covers


class Side(NamedTuple):
    """The implementation that the oracle is compared with, or a trace that it left."""

    title: str
    dtype: str
    # Runs every call and writes its activations; returns each call's coverage: "activations",
    # "logits" (of those alone), or "not covered: " and why. None where there is a trace, which
    # may cover ``LOGPROBS_ALONE``.
    write: Callable[[TraceWriter, Sequence[Call], LlamaConfig, Advance], list[str]] | None
    trace: TraceFile | None = None
    backend: Any = None  # for --grads: the name of a backend, as ``reference_np.backend`` loads it
    weights: Path | None = None  # a checkpoint, where it is not the oracle's
    limits: Limits = UNLIMITED  # of a backend that declares them


class Recording(NamedTuple):
    """The other side's activations, and the coverage of every call."""

    trace: TraceFile
    coverage: list[str]


def trace_coverage(trace: TraceFile, c: int) -> str:
    """Return the coverage of a trace's call: of a file of version 1 everything is expected."""
    names = [name for name in activation_axes(trace.config) if trace.has(c, name)]
    if trace.version == "1" or set(names) - {"logits"}:
        return "activations"
    if names:
        return "logits"
    if not trace.has(c, LOGPROBS):
        return "not covered: the trace has no output of it"
    if (given_targets(trace.calls[c]) == IGNORE).all():
        return "not covered: none of its tokens has a target"
    return LOGPROBS_ALONE


def record(
    side: Side, calls: Sequence[Call], config: LlamaConfig, folder: Path, advance: Advance
) -> Recording:
    """Run the other side on every call, with ``config.n_layers`` layers; record it in ``folder``.

    ``advance`` is called once for every layer of every call.
    """
    if side.write is None:
        assert side.trace is not None
        return Recording(side.trace, [trace_coverage(side.trace, c) for c in range(len(calls))])
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
