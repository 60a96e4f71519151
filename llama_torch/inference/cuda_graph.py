"""Decoding steps captured as CUDA graphs, and the store that keeps them between requests.

Suffixes: B row, T token of this step, D dim, V vocabulary.
"""

import gc
import logging
import time
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model.kv_cache import StaticCache, StaticLayerCache
from ..model.llama import Block, Llama
from ..model.rope import rope_tables
from .config import Decoding
from .step_inputs import StepInputs

MAX_GRAPHS = 2  # captured decoding steps kept for later requests, each with its cache

CACHE_MULTIPLE = 256  # cache sizes are multiples of this many columns, so that graphs are reused

_log = logging.getLogger(__name__)


class Forward(Protocol):
    """The work of a step, as a graph captures it: reads StepInputs, writes the cache."""

    def copy_weights(self) -> None:
        """Copy weights that the graph does not read in place and that may have changed."""

    def launch(self) -> Tensor:
        """Launch the work; return the logits [B, T, V]."""


class GraphStep:
    """A step of ``n_tokens`` tokens a row, captured in a CUDA graph: a DecodeStep.

    Position, column and mask are advanced inside the graph. The logits that a call returns are
    overwritten by the next one.
    """

    is_captured = True

    def __init__(
        self, model: Llama, rows: int, size: int, mode: Decoding, n_tokens: int = 1
    ) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.n_tokens = model, n_tokens
        self.key: Hashable = None  # in the store that it was taken from
        self.store: GraphStore | None = None  # while it is taken
        self.cache = StaticCache(model.config, rows, size, weight.dtype, weight.device)
        self.inputs = StepInputs(rows, size, n_tokens, weight.device)
        start = time.perf_counter()
        self.forward = make_forward(model, self.cache, self.inputs, mode)
        warmup_stream = torch.cuda.Stream()
        warmup_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup_stream):  # a capture must not be the first run
            self._run()
        torch.cuda.current_stream().wait_stream(warmup_stream)
        self.graph = torch.cuda.CUDAGraph()
        # Garbage collection during capture may free CUDA objects, which is illegal.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph):
                self.logits_BTV = self._run()
        finally:
            gc.enable()
        seconds = time.perf_counter() - start
        if seconds > 1:
            _log.warning("prepared the decoding step in %.1f s (%s)", seconds, mode)

    def begin(self, padding: Sequence[int]) -> None:
        """Continue from the cache's length; see DecodeStep."""
        self.forward.copy_weights()
        self.inputs.begin(self.cache.length, padding)

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] after one token a row, where the step has one."""
        return self.replay(tokens_B[:, None])[:, -1]

    def replay(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] after each token, T being the step's own number."""
        self.inputs.tokens.copy_(tokens_BT)
        self.graph.replay()
        self.cache.length += self.n_tokens
        return self.logits_BTV

    def decode_row(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [T, V] after each of a single row's tokens, at most ``n_tokens``."""
        spare = self.n_tokens - len(tokens)
        self.begin([0])
        row_BT = torch.tensor([[*tokens, *[0] * spare]], device=self.inputs.tokens.device)
        return self.replay(row_BT)[0, : len(tokens)].clone()

    def close(self) -> None:
        """Give the step back to the store that it was taken from."""
        if self.store:
            store, self.store = self.store, None
            store.give_back(self)

    def _run(self) -> Tensor:
        logits_BTV = self.forward.launch()
        self.inputs.advance()
        return logits_BTV


def make_forward(model: Llama, cache: StaticCache, inputs: StepInputs, mode: Decoding) -> Forward:
    """Return the work that a graph of this mode captures."""
    if mode != "kernels":
        return TorchForward(model, cache, inputs, mode == "compiled")
    from .triton_batch_step import TritonBatchStep  # triton comes with torch's CUDA builds alone
    from .triton_step import TritonStep

    if len(inputs.tokens) == 1:  # never padded
        return TritonStep(model, cache, inputs)
    return TritonBatchStep(model, cache, inputs, key_mask=inputs.key_mask)


class TorchForward:
    """The model on every column of the cache, its blocks compiled or not: a Forward."""

    def __init__(
        self, model: Llama, cache: StaticCache, inputs: StepInputs, compiled: bool
    ) -> None:
        self.model, self.cache, self.inputs = model, cache, inputs
        # One compiled graph serves all blocks: their parameters are its inputs.
        self.block: Any = Block.forward
        if compiled:
            # What was compiled for other shapes is dropped: past a limit torch compiles no more.
            # The graphs that were captured do not need it.
            torch.compiler.reset()
            self.block = torch.compile(Block.forward, fullgraph=True)

    def copy_weights(self) -> None:
        """Copy nothing: the model's weights are read where they are."""

    def launch(self) -> Tensor:
        """Launch the model on the step's tokens; return the logits [B, T, V]."""
        decoder, inputs = self.model.model, self.inputs
        x_BTD = decoder.embed_tokens(inputs.tokens)
        tables = rope_tables(inputs.positions, self.model.config, x_BTD.dtype)
        mask = inputs.mask()[:, None]
        for i, layer in enumerate(decoder.layers):
            layer_cache = StaticLayerCache(
                self.cache.keys[i], self.cache.values[i], inputs.cache_position
            )
            x_BTD, _ = self.block(layer, x_BTD, tables, mask, False, layer_cache)
        return self.model.head(decoder.norm(x_BTD))


class GraphStore:
    """Captured steps of one model, kept for later requests; the least recent goes first."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.steps: dict[Hashable, GraphStep] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the captured steps out of a copy: CUDA graphs cannot be copied."""
        return {"model": self.model, "steps": {}}

    def take(self, rows: int, cache_size: int, mode: Decoding, n_tokens: int = 1) -> GraphStep:
        """Take a step for so many rows and columns out of the store, or capture it.

        ``close`` puts it back, for the next request of that size: two requests at a time never
        share one.
        """
        model, steps = self.model, self.steps
        rounded_size = -(-cache_size // CACHE_MULTIPLE) * CACHE_MULTIPLE
        weights = (*model.parameters(), *model.buffers())
        # A graph reads the weights where they were, and as what they were, when it was captured.
        key = rows, rounded_size, mode, n_tokens, tuple((w.data_ptr(), w.dtype) for w in weights)
        step = steps.pop(key, None)
        if step is None:
            while len(steps) >= MAX_GRAPHS:
                del steps[next(iter(steps))]
            step = GraphStep(model, rows, rounded_size, mode, n_tokens)
            step.key = key
        else:
            step.cache.clear()  # a model whose weights were broken leaves NaN, which no mask hides
        step.store = self
        return step

    def give_back(self, step: GraphStep) -> None:
        """Keep a step for the next request."""
        self.steps[step.key] = step
