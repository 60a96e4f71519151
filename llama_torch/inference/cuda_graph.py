"""Decoding steps captured in CUDA graphs, and the store that keeps them for later requests.

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

MAX_GRAPHS = 2  # captured decoding steps in a store, each with its cache

CACHE_MULTIPLE = 256  # cache sizes are rounded up to this many columns, so that graphs are reused

_log = logging.getLogger(__name__)


class Forward(Protocol):
    """The forward pass that a graph captures: reads StepInputs, writes the cache."""

    def copy_weights(self) -> None:
        """Copy the weights that the graph reads from a copy: they may have changed."""

    def launch(self) -> Tensor:
        """Launch the forward pass; return the logits [B, T, V]."""


class GraphStep:
    """Decoding step of ``n_tokens`` tokens a row, captured in a CUDA graph: a DecodeStep.

    ``rows`` and ``size`` (columns) are those of its cache. The graph advances the positions and
    the cache position itself. The logits that a call returns are overwritten by the next call.
    """

    is_captured = True

    def __init__(
        self, model: Llama, rows: int, size: int, mode: Decoding, n_tokens: int = 1
    ) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.n_tokens = model, n_tokens
        self.key: Hashable = None  # in the store that it was taken from
        self.store: GraphStore | None = None  # the store to return to, while the step is in use
        self.cache = StaticCache(model.config, rows, size, weight.dtype, weight.device)
        self.inputs = StepInputs(rows, size, n_tokens, weight.device)
        start = time.perf_counter()
        self.forward = make_forward(model, self.cache, self.inputs, mode)
        warmup_stream = torch.cuda.Stream()
        warmup_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            warmup_stream
        ):  # a capture must not be the first run, which allocates
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
        """Continue after the cache's last column; see DecodeStep."""
        self.forward.copy_weights()
        self.inputs.begin(self.cache.length, padding)

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] after one token a row, int64 [B]; for steps of one token."""
        return self.replay(tokens_B[:, None])[:, -1]

    def replay(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] after each of the tokens, int64 [B, T = n_tokens]."""
        self.inputs.tokens.copy_(tokens_BT)
        self.graph.replay()
        self.cache.length += self.n_tokens
        return self.logits_BTV

    def decode_row(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [T, V] after each of one row's T tokens, at most ``n_tokens``.

        The graph runs on ``n_tokens`` tokens: the spare ones are zeros after the T, which causal
        attention hides; the caller resets the cache's length.
        """
        spare = self.n_tokens - len(tokens)
        self.begin([0])
        row_BT = torch.tensor([[*tokens, *[0] * spare]], device=self.inputs.tokens.device)
        return self.replay(row_BT)[0, : len(tokens)].clone()

    def close(self) -> None:
        """Return the step to the store that it was taken from."""
        if self.store:
            store, self.store = self.store, None
            store.give_back(self)

    def _run(self) -> Tensor:
        logits_BTV = self.forward.launch()
        self.inputs.advance()
        return logits_BTV


def make_forward(model: Llama, cache: StaticCache, inputs: StepInputs, mode: Decoding) -> Forward:
    """Return the forward pass that a graph of ``mode`` captures."""
    if mode != "kernels":
        return TorchForward(model, cache, inputs, mode == "compiled")
    from .triton_batch_step import TritonBatchStep  # only torch's CUDA builds install triton
    from .triton_step import TritonStep

    if len(inputs.tokens) == 1:  # one row has no padding, and so needs no mask
        return TritonStep(model, cache, inputs)
    return TritonBatchStep(model, cache, inputs, key_mask=inputs.key_mask)


class TorchForward:
    """The model's forward pass over every column of the cache, compiled or not: a Forward."""

    def __init__(
        self, model: Llama, cache: StaticCache, inputs: StepInputs, compiled: bool
    ) -> None:
        self.model, self.cache, self.inputs = model, cache, inputs
        # One compiled graph serves all blocks: their parameters are its inputs.
        self.block: Any = Block.forward
        if compiled:
            # torch stops compiling after a number of shapes: forget the earlier ones, which the
            # graphs already captured do not need.
            torch.compiler.reset()
            self.block = torch.compile(Block.forward, fullgraph=True)

    def copy_weights(self) -> None:
        """Do nothing: the graph reads the model's weights in place."""

    def launch(self) -> Tensor:
        """Launch the model's forward pass; return the logits [B, T, V]."""
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
    """Captured decoding steps of one model; of more than MAX_GRAPHS the least recent is dropped."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.steps: dict[Hashable, GraphStep] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy, without the captured steps: CUDA graphs cannot be copied."""
        return {"model": self.model, "steps": {}}

    def take(self, rows: int, cache_size: int, mode: Decoding, n_tokens: int = 1) -> GraphStep:
        """Remove and return a captured step of ``rows`` rows; capture one if there is none.

        Its cache has at least ``cache_size`` columns. The step's ``close`` puts it back. Requests
        under way at the same time never share a step. Raises InputError where there is no memory
        for its cache.
        """
        model, steps = self.model, self.steps
        rounded_size = -(-cache_size // CACHE_MULTIPLE) * CACHE_MULTIPLE
        weights = (*model.parameters(), *model.buffers())
        # A graph reads the weights at the addresses and in the dtypes that they had at its capture.
        key = rows, rounded_size, mode, n_tokens, tuple((w.data_ptr(), w.dtype) for w in weights)
        step = steps.pop(key, None)
        if step is None:
            while len(steps) >= MAX_GRAPHS:
                del steps[next(iter(steps))]
            step = GraphStep(model, rows, rounded_size, mode, n_tokens)
            step.key = key
        else:
            step.cache.clear()  # it may hold NaN, and attention's zero times NaN is NaN
        step.store = self
        return step

    def give_back(self, step: GraphStep) -> None:
        """Put a step back for later requests."""
        self.steps[step.key] = step
