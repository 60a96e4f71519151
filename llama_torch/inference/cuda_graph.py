"""Decoding steps captured as CUDA graphs, and the store that keeps them."""

import gc
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.kv_cache import Room, StaticCache
from ..model.llama import Block, Llama
from ..model.rope import rope_tables
from .config import Decoding

KEPT = 2  # captured steps kept for later requests, each with its room

ROUND = 256  # room is taken in multiples of this many columns, so that graphs are met again

_log = logging.getLogger(__name__)


class GraphStep:
    """``n_tokens`` tokens a row, captured in a CUDA graph on a StaticCache; see the module.

    Position, column and mask are advanced inside the graph. The logits [B, T, V] that a call
    returns are overwritten by the next one.
    """

    key: Hashable = None  # in its model's store

    def __init__(
        self, model: Llama, rows: int, size: int, way: Decoding, n_tokens: int = 1
    ) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.way, self.n_tokens = model, way, n_tokens
        self.cache = StaticCache(model.config, rows, size, weight.dtype, weight.device)
        shape = rows, n_tokens
        self.token = torch.zeros(shape, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros_like(self.token)
        self.column = torch.arange(n_tokens, device=weight.device)
        self.columns = torch.arange(size, device=weight.device)
        self.pads = self.token[:, :1].clone()
        self.allowed = torch.ones(rows, size, dtype=torch.bool, device=weight.device)
        self.refresh: Callable[[], None] = lambda: None
        start = time.perf_counter()
        self._forward = self._kernels() if way == "kernels" else self._torch(way == "compiled")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a capture must not be the first run
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # What is collected meanwhile may hold graphs and events, which a capture must not meet.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph):
                self.logits = self._run()
        finally:
            gc.enable()
        seconds = time.perf_counter() - start
        if seconds > 1:
            _log.warning("prepared the decoding step in %.1f s (%s)", seconds, way)

    def begin(self, pads: Sequence[int]) -> None:
        """Continue from the cache's length; the first columns of a row are padding."""
        self.refresh()
        self.pads.copy_(torch.tensor(pads)[:, None])
        torch.ge(self.columns, self.pads, out=self.allowed)
        new = self.cache.length + torch.arange(self.n_tokens, device=self.column.device)
        self.column.copy_(new)
        self.position.copy_((new - self.pads).clamp(min=0))

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits after each token."""
        self.token.copy_(tokens_BT)
        self.graph.replay()
        self.cache.length += self.n_tokens
        return self.logits

    def _run(self) -> Tensor:
        logits = self._forward()
        self.position.add_(self.n_tokens)
        self.column.add_(self.n_tokens)
        return logits

    def _torch(self, compiled: bool) -> Callable[[], Tensor]:
        decoder, cache = self.model.model, self.cache
        # One compiled graph serves all blocks: their parameters are its inputs.
        block: Any = Block.forward
        if compiled:
            # What was compiled for other shapes is dropped: past a limit torch compiles no more.
            # The graphs that were captured do not need it.
            torch.compiler.reset()
            block = torch.compile(block, fullgraph=True)

        def forward() -> Tensor:
            x_BTD = decoder.embed_tokens(self.token)
            tables = rope_tables(self.position, self.model.config, x_BTD.dtype)
            # What is behind a token in the cache, its row's padding left out, but not itself.
            seen = (self.columns <= self.column[:, None]) & (self.columns >= self.pads[..., None])
            mask = (seen | (self.columns == self.column[:, None]))[:, None]
            for i, layer in enumerate(decoder.layers):
                room = Room(cache.keys[i], cache.values[i], self.column)
                x_BTD, _ = block(layer, x_BTD, tables, mask, False, room)
            return self.model.head(decoder.norm(x_BTD))

        return forward

    def _kernels(self) -> Callable[[], Tensor]:
        from .triton_batch_step import BatchStep
        from .triton_step import KernelStep

        step: KernelStep
        if len(self.token) == 1:  # never padded
            step = KernelStep(self.model, self.cache)
        else:
            step = BatchStep(self.model, self.cache, allowed=self.allowed)
        step.token, step.position, step.column = self.token, self.position, self.column
        self.refresh = step.begin

        def forward() -> Tensor:
            step.run()
            return step.logits[:, None]

        return forward


def graph_step(
    model: Llama, rows: int, columns: int, way: Decoding, n_tokens: int = 1
) -> GraphStep:
    """Take a model's step for so many rows and columns out of its store, or make it.

    ``give_back`` puts it into the store, for the next request of that size: two requests at a
    time never share one.
    """
    size = -(-columns // ROUND) * ROUND
    weights = (*model.parameters(), *model.buffers())
    # A graph reads the weights where they were, and as what they were, when it was captured.
    key = rows, size, way, n_tokens, tuple((w.data_ptr(), w.dtype) for w in weights)
    store = _store(model)
    step = store.pop(key, None)
    if step is None:
        while len(store) >= KEPT:
            del store[next(iter(store))]
        step = GraphStep(model, rows, size, way, n_tokens)
        step.key = key
    else:
        step.cache.clear()  # a model whose weights were broken leaves NaN, which no mask hides
    return step


def give_back(step: GraphStep) -> None:
    """Keep a step for the next request."""
    _store(step.model)[step.key] = step


def _store(model: Llama) -> dict[Hashable, GraphStep]:
    store: dict[Hashable, GraphStep] = model.__dict__.setdefault("_graph_steps", {})
    return store
