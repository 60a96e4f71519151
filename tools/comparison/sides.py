"""The other side of a comparison, whatever it is, as a trace of the same calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reference_np.config import LlamaConfig

from .trace_file import Call, Trace, TraceWriter, write_trace

Advance = Callable[[], None]


class Side(NamedTuple):
    """What the checkpoint is compared with, ready to be run."""

    title: str
    dtype: str
    # Writes every call's activations; returns for each call what it covers: "activations",
    # "logits", or "not covered: " and why.
    record: Callable[[TraceWriter, Sequence[Call], LlamaConfig, Advance], list[str]] | None
    trace: Trace | None = None  # already recorded
    backend: Any = None  # for training
    weights: Path | None = None  # other ones than the oracle's


class Recording(NamedTuple):
    """The other side's activations, and what of every call they cover."""

    trace: Trace
    coverage: list[str]


def record(
    side: Side, calls: Sequence[Call], config: LlamaConfig, folder: Path, advance: Advance
) -> Recording:
    """Run the other side on every call, with ``config.n_layers`` layers."""
    if side.record is None:
        assert side.trace is not None
        return Recording(side.trace, ["activations"] * len(calls))
    coverage: list[str] = []
    path = folder / "recording.safetensors"
    write = side.record
    write_trace(
        path,
        config,
        calls,
        side.dtype,
        lambda writer: coverage.extend(write(writer, calls, config, advance)),
    )
    return Recording(Trace(path), coverage)
