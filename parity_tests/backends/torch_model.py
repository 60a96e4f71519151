"""Build and run llama_torch's model from the oracle's config and weights, NumPy in and out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llama_parity.comparison.empty_weights import without_weights
from llama_torch.checkpoint.directory_files import write_directory_files
from llama_torch.checkpoint.hf import save_model
from llama_torch.model.config import ModelConfig
from llama_torch.model.kv_cache import Cache
from llama_torch.model.llama import Llama
from reference_np.config import LlamaConfig

Array = NDArray[Any]


def torch_config(config: LlamaConfig) -> ModelConfig:
    """Return llama_torch's config of the oracle's."""
    return ModelConfig(**dataclasses.asdict(config))


def save_numpy(
    tensors: Mapping[str, Array], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file; safetensors 0.8.0 misorders arrays not contiguous."""
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata)


def torch_model(config: LlamaConfig, params: Mapping[str, Array]) -> Llama:
    """Return the torch model with ``params``, in their dtype; names must match exactly."""
    with without_weights():
        model = Llama(torch_config(config))
    tensors = {name: torch.from_numpy(value.copy()) for name, value in params.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


@torch.inference_mode()
def torch_forward(
    model: Llama,
    tokens: Array,
    *,
    positions: Array | None = None,
    mask: Array | None = None,
    cache: Cache | None = None,
) -> tuple[Array, Cache, dict[str, Array]]:
    """Return logits [B, T, V], cache and activations of the torch model, on its device."""
    device = model.head_weight.device
    trace: dict[str, Array] = {}

    def as_tensor(value: Array | None) -> torch.Tensor | None:
        return None if value is None else torch.from_numpy(np.array(value)).to(device)

    def note(name: str, value: torch.Tensor) -> None:
        wide = value.float() if value.dtype == torch.bfloat16 else value
        trace[name] = wide.cpu().numpy()

    _, cache = model(
        as_tensor(tokens),
        positions=as_tensor(positions),
        mask=as_tensor(mask),
        cache=cache,
        trace=note,
    )
    return trace["logits"], cache, trace


def write_model(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a model with random weights into ``folder``, as a Hugging Face directory."""
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    write_directory_files(folder, config)
    save_model(folder, config, model.state_dict())


def small_model(folder: Path) -> Path:
    """Write a model directory of one layer into a folder, and return that."""
    write_model(folder, ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=24))
    return folder
