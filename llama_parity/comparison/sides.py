"""The other side of a comparison, and the recording of its activations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits

from .trace_file import TraceFile, TraceWriter, write_trace
from .trace_format import Call

Advance = Callable[[], None]


class Side(NamedTuple):
    """The implementation that the oracle is compared with, or a trace that it left."""

    title: str
    dtype: str
    # Runs every call and writes its activations; returns each call's coverage: "activations",
    # "logits" (of those alone), or "not covered: " and why. None where there is a trace.
    write: Callable[[TraceWriter, Sequence[Call], LlamaConfig, Advance], list[str]] | None
    trace: TraceFile | None = None
    backend: Any = None  # for --grads: the name of a backend, as ``reference_np.backend`` loads it
    weights: Path | None = None  # a checkpoint, where it is not the oracle's
    limits: Limits = UNLIMITED  # of a backend that declares them


class Recording(NamedTuple):
    """The other side's activations, and the coverage of every call."""

    trace: TraceFile
    coverage: list[str]


def record(
    side: Side, calls: Sequence[Call], config: LlamaConfig, folder: Path, advance: Advance
) -> Recording:
    """Run the other side on every call, with ``config.n_layers`` layers; record it in ``folder``.

    ``advance`` is called once for every layer of every call.
    """
    if side.write is None:
        assert side.trace is not None
        return Recording(side.trace, ["activations"] * len(calls))
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
