"""Directories of packages whose user states the model: they read the weights, and little else."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llama_parity.comparison.float64 import LiftFloat32
from reference_np.config import InputError, LlamaConfig

from ..backends import torch_port

# Of tensors in the files, which are the loader's to refuse.
OF_TENSORS = ("attention_bias", "mlp_bias")


def stated_config(path: str) -> LlamaConfig:
    """Return the model that a directory's config.json describes, as its user states it by hand.

    Raises NotImplementedError for what a user would state otherwise than as a plain Llama.
    """
    hf = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    try:
        return LlamaConfig.from_hf(hf | dict.fromkeys(OF_TENSORS, False))
    except InputError as error:
        raise NotImplementedError(f"the user states it: {error}") from None


def lifted(dtype: str) -> Any:
    """Return a context in which casts to float32 are to float64, if the dtype is float64."""
    return LiftFloat32() if dtype == "float64" else nullcontext()


def called(module: Any, dtype: str) -> Callable[[Any], Any]:
    """Return a function from tokens [B, T] to a module's logits [B, T, V]."""

    @torch.no_grad()
    def logits(tokens: Any) -> Any:
        with lifted(dtype):
            return torch_port.to_numpy(module(torch.from_numpy(tokens)))

    return logits
