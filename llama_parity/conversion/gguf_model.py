"""Read and write a Llama as a GGUF file; one tensor is in memory at a time.

Writing needs the package ``gguf``, of llama.cpp's makers; reading does not.
"""

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_common.errors import InputError
from llama_torch.model.config import ModelConfig
from reference_np.config import LlamaConfig

from .gguf_checkpoint import GgufCheckpoint, gguf_name, interleaved, rotary_heads
from .gguf_config import ROPE_FREQS, divisors, stored_metadata
from .lazy_weights import Model, Weight, stored, with_progress, write_file

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def model_of(checkpoint: GgufCheckpoint) -> Model:
    """Return the model of a GGUF file. Q8_0 is read as float32, exact."""
    config = ModelConfig.from_hf(checkpoint.hf, str(checkpoint.path))
    weights = {}
    for name in checkpoint:
        entry = checkpoint.entry(name)
        read = partial(_read, checkpoint, name)
        weights[name] = Weight(entry.shape, DTYPES[entry.type.name], read)
    return Model(config, weights)


def _read(checkpoint: GgufCheckpoint, name: str) -> Tensor:
    array = np.ascontiguousarray(checkpoint.stored(name))
    if array.dtype in (np.float32, np.float16):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def require_library() -> None:
    """Raise InputError where the package that writes GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("writing a GGUF file needs gguf: pip install 'llama-parity[gguf]'")


def write_gguf(
    path: Path, model: Model, dtype: torch.dtype | None, vocabulary: Mapping[str, Any]
) -> None:
    """Write a GGUF file of a model: its matrices in ``dtype`` (None = as they are), vectors in F32.

    ``vocabulary`` is metadata by key, the tokenizer's. Raises InputError for float64, which
    llama.cpp does not compute with, and for a disk without room.
    """
    for name, weight in model.weights.items():
        if (dtype or weight.dtype) not in KINDS:
            raise InputError(
                f"{name}: GGUF files of llama.cpp hold no float64; give --dtype float32"
            )
    config = LlamaConfig.from_hf(model.config.to_hf())
    metadata: dict[str, Any] = {**stored_metadata(config), **vocabulary}
    write_file(path, partial(_write, model=model, config=config, dtype=dtype, metadata=metadata))


def _write(
    path: Path,
    model: Model,
    config: LlamaConfig,
    dtype: torch.dtype | None,
    metadata: Mapping[str, Any],
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _add(writer, key, value)
    types = {name: _stored_type(weight, dtype) for name, weight in model.weights.items()}
    extra = divisors(config).astype(np.float32) if config.rope_type == "llama3" else None
    if extra is not None:
        writer.add_tensor_info(ROPE_FREQS, extra.shape, extra.dtype, extra.nbytes)
    for name, weight in model.weights.items():
        size = torch.Size(weight.shape).numel() * types[name].itemsize
        kind = gguf.GGMLQuantizationType[KINDS[types[name]]]
        # float32 stands for any type here but bytes: the next argument says which.
        entry = (weight.shape, np.dtype(np.float32), size)
        writer.add_tensor_info(gguf_name(name), *entry, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra)
        for name in with_progress(model.weights, path.name):
            writer.write_tensor_data(_array(name, model.weights[name], types[name], config))
    finally:
        writer.close()


def _stored_type(weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    """Return what a parameter is stored as; llama.cpp's kernels want vectors in F32."""
    return torch.float32 if len(weight.shape) == 1 else dtype or weight.dtype


def _array(
    name: str, weight: Weight, dtype: torch.dtype, config: LlamaConfig
) -> "np.ndarray[Any, Any]":
    """Return a parameter's bits in llama.cpp's order of rows."""
    tensor = stored(name, weight, dtype).contiguous()
    array = tensor.view(torch.int16).numpy() if dtype == torch.bfloat16 else tensor.numpy()
    n_heads = rotary_heads(name, config)
    return np.ascontiguousarray(interleaved(array, n_heads)) if n_heads else array


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key: integers are stored as 32 bits without a sign, floats as 32 bits."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)
