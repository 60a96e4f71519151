"""Read and write a Hugging Face model directory; one tensor is in memory at a time."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_common.files import write_json
from llama_torch.checkpoint.file_names import INDEX_FILE, MODEL_FILE
from llama_torch.checkpoint.hf import DTYPES, locate, read_tensor, require_kind, require_match
from llama_torch.model.shapes import ParameterShapes

from .lazy_weights import Model, Weight, label, stored, with_progress, write_file

LABELS = {dtype: name for name, dtype in DTYPES.items()}  # dtypes' names in safetensors files


def read_hf(path: Path) -> Model:
    """Open a model directory or a .safetensors file; InputError as ``load_model`` raises it."""
    config, files = locate(path)
    require_kind(path, files)
    expected = ParameterShapes(config)
    require_match(path, expected, {name: where.shape for name, where in files.items()})
    weights = {}
    for name in expected:
        file, shape, dtype = files[name]
        weights[name] = Weight(shape, dtype, partial(read_tensor, file, name, dtype))
    return Model(config, weights)


def write_hf(
    folder: Path,
    model: Model,
    dtype: torch.dtype | None,
    max_shard_gb: float,
    ids: Mapping[str, Any],
) -> None:
    """Write config.json and the safetensors files, with an index where they are several."""
    hf = model.config.to_hf() | {"dtype": label(dtype or model.dtype), **ids}
    metadata = {"format": "pt", "config": json.dumps(hf)}
    sizes = {
        name: math.prod(weight.shape) * (dtype or weight.dtype).itemsize
        for name, weight in model.weights.items()
    }
    groups = grouped(sizes, max_shard_gb * 1e9)
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else MODEL_FILE
        _write_group(folder / file, model, group, dtype, metadata)
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": weight_map})
    write_json(folder / "config.json", hf)


def _write_group(
    path: Path,
    model: Model,
    names: Sequence[str],
    dtype: torch.dtype | None,
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file as its format says: length of the header, header, tensors."""
    # Each lies at a multiple of its element's size, as the library writes them.
    dtypes = {name: dtype or model.weights[name].dtype for name in names}
    names = sorted(names, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        shape, start = model.weights[name].shape, end
        end += math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": LABELS[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def save(path: Path) -> None:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in with_progress(names, path.name):
                content = stored(name, model.weights[name], dtype).flatten().view(torch.uint8)
                file.write(content.numpy().data)
                del content  # before the next one is read

    write_file(path, save)


def grouped(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    """Cut names, in order, into runs whose sizes sum to at most ``limit``, or that are one name."""
    groups: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
