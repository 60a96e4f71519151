"""Backends of llama_torch's decoding steps; see llama_torch/inference/decoding.py.

A decoding step takes one token of every row, so prompts too are decoded token by token.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llama_torch.inference.config import Decoding, Quantize
from llama_torch.inference.cuda_graph import GraphStep
from llama_torch.inference.native_library import load
from llama_torch.inference.native_step import NativeStep
from llama_torch.inference.numpy_step import NumpyStep
from llama_torch.inference.quantization import dequantize, quantize
from llama_torch.inference.step_inputs import StepInputs
from llama_torch.model.cpu_linear import onednn_products, parts_with_products
from llama_torch.model.kv_cache import StaticCache
from llama_torch.model.llama import Llama
from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.limits import Limits

from .torch_backends import HALVES, Torch


class Static(Torch):
    """The model with a StaticCache, copied at each call, as the protocol's cache never changes."""

    loss_and_grads = train = None  # type: ignore[assignment]  # inference alone

    def __init__(self, device: str = "cpu", quantized: Quantize = "none", **settings: Any) -> None:
        super().__init__(device, **settings)
        self.quantized = quantized
        if quantized != "none":
            self.dtypes = ("float64",)
            self.effective_params = self._dequantized

    def _model(self, config: LlamaConfig, params: Params) -> Llama:
        model = super()._model(config, params)
        return quantize(model, self.quantized)

    def _dequantized(self, config: LlamaConfig, params: Params) -> Params:
        # Quantised on the CPU, so that the GPU's quantisation is compared with it.
        model = quantize(Torch()._model(config, params), self.quantized)
        return {name: value.numpy() for name, value in dequantize(model).items()}

    def _cache_for(self, model: Llama, tokens: Array, cache: StaticCache | None) -> StaticCache:
        weight, length = model.model.embed_tokens.weight, 0 if cache is None else cache.length
        rows, new = tokens.shape
        # One position more than needed, all filled with 9: positions that are not written yet
        # must not change the result.
        new_cache = StaticCache(model.config, rows, length + new + 1, weight.dtype, weight.device)
        new_cache.keys.fill_(9.0)
        new_cache.values.fill_(9.0)
        if cache is not None:
            new_cache.keys[..., :length, :] = cache.keys[..., :length, :]
            new_cache.values[..., :length, :] = cache.values[..., :length, :]
            new_cache.length = length
        return new_cache


class OneDnn(Static):
    """The model with its blocks' products by oneDNN, as prompts may run on a CPU."""

    def _model(self, config: LlamaConfig, params: Params) -> Llama:
        model = super()._model(config, params)
        for part in parts_with_products(model):
            part.products = onednn_products
        return model


class Stepwise(Static):
    """Decoding one token of every row at a time."""

    limits = Limits(masks="no later keys")
    trace = traced_decode = None  # type: ignore[assignment]  # a step has no activations to trace

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
        new_cache = self._cache_for(model, tokens, cache)
        start, (rows, new) = new_cache.length, tokens.shape
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
            logits = self._steps(model, new_cache, tokens, positions, mask)
        new_cache.length = start + new
        return logits.double().cpu().numpy(), new_cache

    def _steps(
        self, model: Llama, new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        """Return logits [B, T, V] and write the cache's next T positions."""
        raise NotImplementedError


class Numpy(Stepwise):
    """Decoding in NumPy, with consecutive positions and a causal mask only."""

    limits = Limits(masks="causal", positions="consecutive")

    def _steps(
        self, model: Llama, new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        _require_consecutive(new_cache, tokens, positions, mask)
        rows = []
        for i, row in enumerate(tokens):
            step = NumpyStep(model, _row(new_cache, i))
            rows.append(torch.cat([step.decode(token) for token in torch.from_numpy(row).split(1)]))
        return torch.stack(rows)


class Native(Stepwise):
    """Decoding in compiled C, all rows at once, each behind its columns of padding."""

    limits = Limits(masks="left padding", positions="consecutive")

    def _steps(
        self, model: Llama, new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        step = NativeStep(model, new_cache)
        padding = _left_padding(new_cache, mask)
        step.begin(padding.tolist())
        columns = np.arange(mask.shape[2])[new_cache.length :]
        if (positions != (columns - padding[:, None]).clip(min=0)).any():
            raise NotImplementedError("positions follow the padding")
        return torch.stack([step.decode(each) for each in torch.from_numpy(tokens.T)], dim=1)


class Kernels(Stepwise):
    """Decoding by the Triton kernels for one sequence, each row by itself."""

    def _steps(
        self, model: Llama, new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        from llama_torch.inference.triton_step import TritonStep

        rows = zip(tokens, positions, mask, strict=True)
        return torch.cat(
            [
                self._run(TritonStep, model, _row(new_cache, i), *(part[None] for part in row))
                for i, row in enumerate(rows)
            ]
        )

    def _run(
        self, kind: Any, model: Llama, new_cache: Any, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        """Return logits [B, T, V] of a TritonStep or TritonBatchStep on all rows of a cache."""

        def put(array: Array) -> torch.Tensor:
            return torch.from_numpy(np.array(array)).to(self.device)

        inputs = StepInputs(len(tokens), new_cache.size, 1, self.device)
        inputs.key_mask.fill_(False)
        step = kind(model, new_cache, inputs, inputs.key_mask, int(positions.max()) + 1)
        step.copy_weights()
        found = []
        for t in range(tokens.shape[1]):
            inputs.tokens.copy_(put(tokens[:, t : t + 1]))
            inputs.positions.copy_(put(positions[:, t : t + 1]))
            inputs.cache_position.fill_(new_cache.length + t)
            inputs.key_mask[:, : mask.shape[2]] = put(mask[:, t])
            found.append(step.launch().clone())
        return torch.cat(found, dim=1)


class BatchKernels(Kernels):
    """Decoding by the Triton kernels for several sequences."""

    def _steps(
        self, model: Llama, new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        from llama_torch.inference.triton_batch_step import TritonBatchStep

        return self._run(TritonBatchStep, model, new_cache, tokens, positions, mask)


class Graph(Stepwise):
    """Decoding by a captured CUDA graph."""

    limits = Limits(masks="left padding")

    def __init__(self, mode: Decoding, **settings: Any) -> None:
        super().__init__("cuda", **settings)
        self.mode = mode

    def _steps(
        self, model: Llama, new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
    ) -> torch.Tensor:
        pads = _left_padding(new_cache, mask)
        logging.getLogger("llama_torch.inference.cuda_graph").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler advises other precisions
            step = GraphStep(model, len(tokens), new_cache.size, self.mode)
        step.cache.keys.copy_(new_cache.keys)
        step.cache.values.copy_(new_cache.values)
        step.cache.length = new_cache.length
        step.begin(pads.tolist())
        found = []
        for t in range(tokens.shape[1]):
            step.inputs.positions.copy_(torch.from_numpy(positions[:, t : t + 1].copy()))
            found.append(
                step.replay(torch.from_numpy(tokens[:, t : t + 1]).to(self.device)).clone()
            )
        new_cache.keys, new_cache.values = step.cache.keys, step.cache.values
        return torch.cat(found, dim=1)


def has_native() -> bool:
    """Return whether the compiled step can be had on this machine."""
    return load(torch.float64) is not None


def _row(new_cache: StaticCache, i: int) -> Any:
    """Return a view of one row of a cache."""
    keys, values = new_cache.keys[:, i : i + 1], new_cache.values[:, i : i + 1]
    return SimpleNamespace(keys=keys, values=values, size=new_cache.size, length=new_cache.length)


def _left_padding(new_cache: StaticCache, mask: Array) -> Array:
    """Return each row's columns of padding, int64 [B], which are on the left of a causal mask."""
    columns = np.arange(mask.shape[2])
    own = columns == columns[new_cache.length :, None]
    pads: Array = (mask | own).argmax(2).min(1)  # the first column that any query sees
    behind = (columns <= columns[new_cache.length :, None]) & (columns >= pads[:, None, None])
    if ((behind | own) != mask).any():
        raise NotImplementedError("the mask is causal, with padding on the left")
    return pads


def _require_consecutive(
    new_cache: StaticCache, tokens: Array, positions: Array, mask: Array
) -> None:
    columns = np.arange(mask.shape[2])
    if (positions != columns[new_cache.length :]).any() or (
        mask != (columns <= columns[new_cache.length :, None])
    ).any():
        raise NotImplementedError("it takes neither positions nor a mask")


_SOME: Mapping[str, Any] = {"example_fraction": 0.3}
FLOATS: Sequence[str] = ("float64", "float32")
static = Static(**_SOME)
onednn = OneDnn(dtypes=("float32",), **_SOME)
int8 = Static(quantized="int8", **_SOME)
int4 = Static(quantized="int4", **_SOME)
numpy_step = Numpy(dtypes=FLOATS, **_SOME)
native_step = Native(dtypes=(*FLOATS, "bfloat16"), **_SOME)
cuda_static = Static("cuda", **_SOME)
cuda_kernels = Kernels("cuda", dtypes=(*FLOATS, *HALVES), example_fraction=0.05)
cuda_kernels_int8 = Kernels("cuda", quantized="int8", example_fraction=0.05)
cuda_batch_kernels = BatchKernels("cuda", dtypes=(*FLOATS, *HALVES), example_fraction=0.05)
cuda_batch_kernels_int8 = BatchKernels("cuda", quantized="int8", example_fraction=0.05)
cuda_graph = Graph("graph", example_fraction=0.3)
cuda_graph_compiled = Graph("compiled", example_fraction=0.02)
