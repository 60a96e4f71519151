"""The decoding step's protocol, its modes, and the choice between them.

mode      step                    computes a token's logits with
eager     EagerStep               the model: any device, any number of rows.
native    NativeStep              C, compiled on this machine: up to 32 rows, CPU.
numpy     NumpyStep               NumPy: one row, CPU, where there is no compiler.
graph     GraphStep(TorchForward) the model on every cache column, captured in a CUDA graph.
compiled  GraphStep(TorchForward) the same after torch.compile: seconds, cached on disk.
kernels   GraphStep(TritonStep for one row, TritonBatchStep for 2 to 64): Triton, in a CUDA graph.

speculative.py has a step that verifies draft tokens. Suffixes: B row, V vocabulary.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..model.int4_linear import Int4Linear
from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from .config import Decoding
from .cpu_choice import decoding_mode, prompt_products
from .cuda_graph import GraphStore
from .eager_step import EagerStep
from .native_step import MAX_ROWS, NativeStep
from .numpy_step import NumpyStep

CAPTURED_MODES = ("graph", "compiled", "kernels")  # modes that replay a CUDA graph

MIN_GRAPH_TOKENS = 32  # fewer new tokens than this do not repay the capture of a graph

MIN_TRITON_VERSION = (3, 6)  # the oldest that compiles the kernels; torch 2.11 has it

MAX_KERNEL_BATCH = 64  # rows of the kernels: with more, reading the weights is no longer the limit


class DecodeStep(Protocol):
    """Computes the logits [B, V] after one more token of every row, with a cache that it writes."""

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph is replayed.

        Its rows are fixed, finished or not, and the next step can be launched before the host
        has read the tokens.
        """

    @property
    def cache(self) -> StaticCache:
        """The rows' keys and values: prefill writes the prompts' columns, each step one more."""

    def begin(self, padding: Sequence[int]) -> None:
        """Continue after the cache's last column; row i has ``padding[i]`` columns of padding."""

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] after one token a row, int64 [B]."""

    def close(self) -> None:
        """Release the step for later requests; it must not be used afterwards."""


def make_step(
    model: Llama,
    rows: int,
    cache_size: int,
    n_tokens: int,
    decoding: Decoding = "auto",
    graphs: GraphStore | None = None,
    tokens_per_step: int = 1,
) -> DecodeStep:
    """Return a decoding step and its cache for ``rows`` sequences of ``n_tokens`` new tokens.

    ``cache_size`` is the number of columns that the prompts and the new tokens take. Captured
    steps are taken from ``graphs`` (None: captured anew) and run ``tokens_per_step`` tokens of a
    row at a time. Raises InputError where the mode ``decoding`` cannot run, or memory does not
    suffice.
    """
    assert graphs is None or graphs.model is model
    mode = choose_mode(decoding, model, rows, n_tokens)
    if mode in CAPTURED_MODES:
        # A step of several tokens that begins at one of the last columns writes beyond them.
        cache_size += tokens_per_step - 1
        return (graphs or GraphStore(model)).take(rows, cache_size, mode, tokens_per_step)
    weight = model.model.embed_tokens.weight
    cache = StaticCache(model.config, rows, cache_size, weight.dtype, weight.device)
    if mode == "native":
        return NativeStep(model, cache)
    if mode == "numpy":
        return NumpyStep(model, cache)
    return EagerStep(model, cache, prompt_products(model, decoding))


def choose_mode(decoding: Decoding, model: Llama, rows: int, n_tokens: int) -> Decoding:
    """Return the mode for ``rows`` sequences of ``n_tokens`` new tokens; never "auto".

    ``decoding`` other than "auto" is returned as it is. Raises InputError where it cannot run.
    """
    if decoding == "eager":
        return decoding
    weight = model.model.embed_tokens.weight
    on_gpu = weight.device.type == "cuda"
    if decoding == "auto" and not on_gpu:
        # The prompt's own pass gives the first token.
        return decoding_mode(model, rows) if n_tokens > 1 else "eager"
    has_kernels = on_gpu and rows <= MAX_KERNEL_BATCH and _has_kernels() and not _is_int4(model)
    # Without tensor cores for the weights' precision (16 bits, from Ampere on), Triton's products
    # of several rows are slower than torch's.
    has_tensor_cores = (
        weight.itemsize == 2 and on_gpu and torch.cuda.get_device_capability(weight.device) >= (8,)
    )
    if decoding == "auto":
        if n_tokens < MIN_GRAPH_TOKENS:
            return "eager"
        return "kernels" if has_kernels and (rows == 1 or has_tensor_cores) else "graph"
    if decoding in CAPTURED_MODES and not on_gpu:
        raise InputError(f"--decoding {decoding} needs a GPU; leave the flag out")
    if decoding == "kernels" and not has_kernels:
        raise InputError(
            f"--decoding kernels is for at most {MAX_KERNEL_BATCH} prompts, needs an NVIDIA GPU "
            f"and triton {'.'.join(map(str, MIN_TRITON_VERSION))}, and reads no int4; use graph"
        )
    if decoding == "native" and not NativeStep.supports(model, rows):
        raise InputError(
            f"--decoding native is for at most {MAX_ROWS} prompts on the CPU in float32, float64 "
            "or bfloat16, and needs a C compiler with OpenMP; use eager"
        )
    if decoding == "numpy" and not (rows == 1 and NumpyStep.supports(model)):
        raise InputError(
            "--decoding numpy is for one prompt on the CPU in float32 or float64; use eager"
        )
    return decoding


def _is_int4(model: Llama) -> bool:
    """Return whether a model has int4 weights, which the kernels do not read."""
    return any(isinstance(module, Int4Linear) for module in model.modules())


def _has_kernels() -> bool:
    """Return whether torch is built for NVIDIA GPUs, with a triton that compiles the kernels."""
    if torch.version.hip is not None:
        return False
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return False  # only torch's CUDA builds install it
    return tuple(map(int, triton.__version__.split(".")[:2])) >= MIN_TRITON_VERSION
