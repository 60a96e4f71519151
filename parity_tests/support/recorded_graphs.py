"""A substitute of CUDA graphs for machines without a GPU.

A replay runs the recorded step again, and asserts that its tensors are at the addresses of the
recording, the only ones that a captured graph can read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_torch.inference.cuda_graph import GraphStep
from llama_torch.inference.engine import DecodeBatch


class Recording:
    """A substitute of torch.cuda.CUDAGraph."""

    recorded: "Recording | None" = None  # the recording in progress

    def keep(self, step: GraphStep, run: Callable[[GraphStep], torch.Tensor]) -> torch.Tensor:
        """Record the step, its function and the addresses of its tensors; return its logits."""
        self.step, self.run, self.memory = step, run, memory_of(step)
        return run(step).clone()

    def replay(self) -> None:
        """Run the recorded step again; AssertionError where its tensors have moved."""
        assert memory_of(self.step) == self.memory, "a graph is replayed on other memory"
        self.step.logits_BTV.copy_(self.run(self.step))


def read_ahead(batch: DecodeBatch, results: torch.Tensor) -> torch.Tensor:
    """Run the next step before the results are read, as on a GPU: a substitute of _read_ahead."""
    read = results.clone()
    batch._launch_next()
    return read


def memory_of(step: GraphStep) -> list[tuple[int, torch.dtype, torch.Size]]:
    """Return address, dtype and shape of every tensor that a step reads or writes."""
    model, cache, own = step.model, step.cache, step.inputs
    inputs = (
        own.tokens,
        own.positions,
        own.cache_position,
        own.key_positions,
        own.padding,
        own.key_mask,
    )
    tensors = (*model.parameters(), *model.buffers(), cache.keys, cache.values, *inputs)
    return [(x.data_ptr(), x.dtype, x.shape) for x in tensors]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.cuda's graphs and streams, so that steps are recorded on a CPU."""

    @contextmanager
    def graph(recording: Recording) -> Iterator[None]:
        Recording.recorded = recording
        yield
        Recording.recorded = None

    def stream() -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def run_or_record(step: GraphStep) -> torch.Tensor:
        return Recording.recorded.keep(step, once) if Recording.recorded else once(step)

    once = GraphStep._run
    monkeypatch.setattr(GraphStep, "_run", run_or_record)
    for name, stub in (("graph", graph), ("CUDAGraph", Recording), ("Stream", stream)):
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
