"""llama_torch's decoding steps behind the protocol; see llama_torch/inference/decoding.py.

A step of one token is fed every call token by token, prompts too.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llama_torch.inference.config import Decoding
from llama_torch.inference.cuda_graph import GraphStep
from llama_torch.inference.numpy_step import NumpyStep
from llama_torch.inference.quantization import dequantize, quantize
from llama_torch.inference.step_inputs import StepInputs
from llama_torch.model.kv_cache import StaticCache
from llama_torch.model.llama import Llama
from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig

from .torch_backends import HALVES, Torch


class Static(Torch):
    """The model on a StaticCache, which is copied at each call: to the suite a cache is a value."""

    loss_and_grads = train = None  # type: ignore[assignment]  # inference alone

    def __init__(self, device: str = "cpu", int8: bool = False, **settings: Any) -> None:
        super().__init__(device, **settings)
        self.int8 = int8
        if int8:
            self.dtypes = ("float64",)
            self.effective_params = self._dequantized

    def _model(self, config: LlamaConfig, params: Params) -> Llama:
        model = super()._model(config, params)
        return quantize(model) if self.int8 else model

    def _dequantized(self, config: LlamaConfig, params: Params) -> Params:
        # On the CPU, so that the GPU's quantisation is held to it.
        model = quantize(Torch()._model(config, params))
        return {name: value.numpy() for name, value in dequantize(model).items()}

    def _before(self, model: Llama, tokens: Array, cache: StaticCache | None) -> StaticCache:
        weight, length = model.model.embed_tokens.weight, 0 if cache is None else cache.length
        rows, new = tokens.shape
        # A column more than needed: what is not written yet must not be seen.
        own_cache = StaticCache(model.config, rows, length + new + 1, weight.dtype, weight.device)
        own_cache.keys.fill_(9.0)
        own_cache.values.fill_(9.0)
        if cache is not None:
            own_cache.keys[..., :length, :] = cache.keys[..., :length, :]
            own_cache.values[..., :length, :] = cache.values[..., :length, :]
            own_cache.length = length
        return own_cache


class Stepwise(Static):
    """One token of every row at a time."""

    trace = traced_decode = None  # type: ignore[assignment]  # a step shows nothing inside

    def decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: StaticCache | None,
    ) -> tuple[Array, StaticCache]:
        model = self._model(config, params)
        own_cache = self._before(model, tokens, cache)
        start, (rows, new) = own_cache.length, tokens.shape
        columns = np.arange(start, start + new)
        if positions is None:
            positions = np.broadcast_to(columns, tokens.shape)
        if mask is None:
            mask = np.broadcast_to(
                np.arange(start + new) <= columns[:, None], (rows, new, start + new)
            )
        if (mask & (np.arange(start + new) > columns[:, None])).any():
            raise NotImplementedError("a step sees no later tokens")
        with torch.inference_mode():
            logits = self._steps(model, own_cache, tokens, positions, mask)
        own_cache.length = start + new
        return logits.double().cpu().numpy(), own_cache

    def _steps(
        self, model: Llama, own_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        """Return logits [B, T, V], having written the cache's next columns."""
        raise NotImplementedError


class Numpy(Stepwise):
    """Through NumPy: no positions of its own and no mask."""

    def _steps(
        self, model: Llama, own_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        _only_plain(own_cache, tokens, positions, mask)
        rows = []
        for i, row in enumerate(tokens):
            step = NumpyStep(model, _row(own_cache, i))
            rows.append(torch.cat([step.decode(token) for token in torch.from_numpy(row).split(1)]))
        return torch.stack(rows)


class Kernels(Stepwise):
    """Through the Triton kernels, with any positions and mask that a step can see."""

    def _steps(
        self, model: Llama, own_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        from llama_torch.inference.triton_step import TritonStep

        rows = zip(tokens, positions, mask, strict=True)
        return torch.cat(
            [
                self._run(TritonStep, model, _row(own_cache, i), *(part[None] for part in row))
                for i, row in enumerate(rows)
            ]
        )

    def _run(
        self, kind: Any, model: Llama, own_cache: Any, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        """Take the steps of a TritonStep, or a TritonBatchStep, on all rows of a cache."""

        def put(array: Array) -> torch.Tensor:
            return torch.from_numpy(np.array(array)).to(self.device)

        inputs = StepInputs(len(tokens), own_cache.size, 1, self.device)
        inputs.key_mask.fill_(False)
        step = kind(model, own_cache, inputs, inputs.key_mask, int(positions.max()) + 1)
        step.copy_weights()
        found = []
        for t in range(tokens.shape[1]):
            inputs.tokens.copy_(put(tokens[:, t : t + 1]))
            inputs.positions.copy_(put(positions[:, t : t + 1]))
            inputs.cache_position.fill_(own_cache.length + t)
            inputs.key_mask[:, : mask.shape[2]] = put(mask[:, t])
            found.append(step.launch().clone())
        return torch.cat(found, dim=1)


class BatchKernels(Kernels):
    """Through those for several sequences."""

    def _steps(
        self, model: Llama, own_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        from llama_torch.inference.triton_batch_step import TritonBatchStep

        return self._run(TritonBatchStep, model, own_cache, tokens, positions, mask)


class Graph(Stepwise):
    """Captured in a CUDA graph."""

    def __init__(self, mode: Decoding, **settings: Any) -> None:
        super().__init__("cuda", **settings)
        self.mode = mode

    def _steps(
        self, model: Llama, own_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        columns = np.arange(mask.shape[2])
        own = columns == columns[own_cache.length :, None]
        pads = (mask | own).argmax(2).min(1)  # the first column that any query sees
        behind = (columns <= columns[own_cache.length :, None]) & (columns >= pads[:, None, None])
        if ((behind | own) != mask).any():
            raise NotImplementedError("a graph's mask is causal, with padding on the left")
        logging.getLogger("llama_torch.inference.cuda_graph").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler advises other precisions
            step = GraphStep(model, len(tokens), own_cache.size, self.mode)
        step.cache.keys.copy_(own_cache.keys)
        step.cache.values.copy_(own_cache.values)
        step.cache.length = own_cache.length
        step.begin(pads.tolist())
        found = []
        for t in range(tokens.shape[1]):
            step.inputs.positions.copy_(torch.from_numpy(positions[:, t : t + 1].copy()))
            found.append(
                step.replay(torch.from_numpy(tokens[:, t : t + 1]).to(self.device)).clone()
            )
        own_cache.keys, own_cache.values = step.cache.keys, step.cache.values
        return torch.cat(found, dim=1)


def _row(own_cache: StaticCache, i: int) -> Any:
    """Return one row's part of a cache, as a view."""
    keys, values = own_cache.keys[:, i : i + 1], own_cache.values[:, i : i + 1]
    return SimpleNamespace(keys=keys, values=values, size=own_cache.size, length=own_cache.length)


def _only_plain(own_cache: StaticCache, tokens: Array, positions: Array, mask: Array) -> None:
    columns = np.arange(mask.shape[2])
    if (positions != columns[own_cache.length :]).any() or (
        mask != (columns <= columns[own_cache.length :, None])
    ).any():
        raise NotImplementedError("it takes neither positions nor a mask")


_SOME: Mapping[str, Any] = {"example_fraction": 0.3}
FLOATS: Sequence[str] = ("float64", "float32")
static = Static(**_SOME)
int8 = Static(int8=True, **_SOME)
numpy_step = Numpy(dtypes=FLOATS, **_SOME)
cuda_static = Static("cuda", **_SOME)
cuda_kernels = Kernels("cuda", dtypes=(*FLOATS, *HALVES), example_fraction=0.05)
cuda_kernels_int8 = Kernels("cuda", int8=True, example_fraction=0.05)
cuda_batch_kernels = BatchKernels("cuda", dtypes=(*FLOATS, *HALVES), example_fraction=0.05)
cuda_batch_kernels_int8 = BatchKernels("cuda", int8=True, example_fraction=0.05)
cuda_graph = Graph("graph", example_fraction=0.3)
cuda_graph_compiled = Graph("compiled", example_fraction=0.02)
