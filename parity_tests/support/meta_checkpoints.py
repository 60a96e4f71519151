"""Small checkpoints in Meta's and Hugging Face's form, written and read without the converter."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_np.config import LlamaConfig

from ..conformance.strategies import random_params

DTYPES = {t: getattr(torch, t) for t in ("float64", "float32", "bfloat16", "float16")}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 8192,
}
# The special tokens of every checkpoint here; the smallest vocabulary has two.
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1}
# Of each layer: Meta's name, rows, columns, the axis that model parallelism splits.
LAYER = (
    ("attention.wq", "dim", "dim", 0),
    ("attention.wk", "keys", "dim", 0),
    ("attention.wv", "keys", "dim", 0),
    ("attention.wo", "dim", "dim", 1),
    ("feed_forward.w1", "hidden", "dim", 0),
    ("feed_forward.w2", "dim", "hidden", 1),
    ("feed_forward.w3", "hidden", "dim", 0),
    ("attention_norm", "dim", None, None),
    ("ffn_norm", "dim", None, None),
)


class Cut(NamedTuple):
    """A config that Meta's form can express, the stored dtype, the number of files and a seed."""

    config: LlamaConfig
    dtype: torch.dtype
    shards: int
    seed: int


def write_hf(folder: Path, config: LlamaConfig, tensors: dict[str, Tensor], n_files: int) -> Path:
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for i in range(n_files):
        file = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::n_files]}, folder / file)
        weight_map |= dict.fromkeys(names[i::n_files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_hf() | TOKEN_IDS))
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder's safetensors files, read by the library alone."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def meta_axes(n_layers: int, embedding_axis: int) -> dict[str, int | None]:
    axes: dict[str, int | None] = {"tok_embeddings.weight": embedding_axis}
    for i in range(n_layers):
        axes |= {f"layers.{i}.{name}.weight": axis for name, _, _, axis in LAYER}
    return axes | {"norm.weight": None, "output.weight": 0}


def meta_tensors(cut: Cut) -> dict[str, Tensor]:
    """Return random weights by Meta's names, unsplit."""
    config = cut.config
    sizes = {"dim": config.dim, "hidden": config.hidden_dim}
    sizes["keys"] = config.n_kv_heads * config.dim // config.n_heads
    generator = torch.Generator().manual_seed(cut.seed)

    def drawn(*shape: int) -> Tensor:
        value = torch.randn(shape, dtype=torch.float64, generator=generator)
        value = 1 + 0.3 * value if len(shape) == 1 else value / shape[1] ** 0.5
        return value.to(cut.dtype)

    tensors = {"tok_embeddings.weight": drawn(config.vocab_size, config.dim)}
    for i in range(config.n_layers):
        for name, rows, columns, _ in LAYER:
            shape = (sizes[rows],) if columns is None else (sizes[rows], sizes[columns])
            tensors[f"layers.{i}.{name}.weight"] = drawn(*shape)
    tensors["norm.weight"] = drawn(config.dim)
    tied = config.tie_embeddings
    tensors["output.weight"] = (
        tensors["tok_embeddings.weight"].clone() if tied else drawn(config.vocab_size, config.dim)
    )
    return tensors


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """Return params.json as released: vocab_size -1, the feed-forward width by Meta's rule."""
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"n_kv_heads": config.n_kv_heads, "norm_eps": config.norm_eps, "vocab_size": -1}
    params |= {"multiple_of": 1, "rope_theta": config.rope_theta}
    params["ffn_dim_multiplier"] = (config.hidden_dim + 0.25) / int(8 * config.dim / 3)
    if config.rope_type == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_factor}
    return params


def write_meta(
    folder: Path, params: dict[str, Any], tensors: dict[str, Tensor], shards: int, axis: int = 1
) -> Path:
    folder.mkdir()
    axes = meta_axes(params["n_layers"], axis)
    for i in range(shards):
        part = {"rope.freqs": torch.ones(2)}
        for name, value in tensors.items():
            if (cut_axis := axes.get(name)) is not None:
                # Not contiguous where columns are split, and stored so.
                value = value.tensor_split(shards, cut_axis)[i]
            part[name] = value
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "generation_config.json").write_text(json.dumps(TOKEN_IDS))
    return folder


def read_meta(folder: Path, axis: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return params.json and the tensors, concatenated along the axes of Meta's loaders."""
    params = json.loads((folder / "params.json").read_text())
    parts = [torch.load(path) for path in sorted(folder.glob("*.pth"))]
    axes = meta_axes(params["n_layers"], axis)
    assert all(part.keys() == axes.keys() for part in parts)
    for name in (name for name, axis in axes.items() if axis is None):
        assert all(bits(part[name]) == bits(parts[0][name]) for part in parts)
    return params, {
        name: parts[0][name] if axis is None else torch.cat([part[name] for part in parts], axis)
        for name, axis in axes.items()
    }


def bits(tensor: Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().contiguous().view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert bits(value) == bits(right[name]), name


CONFIG = LlamaConfig(24, 2, 6, 2, 4, 40, 30)
CUT = Cut(CONFIG, torch.float32, 2, 0)


def a_meta(folder: Path, shards: int = 2, **params: object) -> Path:
    """Write a small Meta checkpoint, some keys of its params.json changed or (None) left out."""
    changed = meta_params(CONFIG) | {"ffn_dim_multiplier": 0.63, "multiple_of": 8} | params
    changed = {key: value for key, value in changed.items() if value is not None}
    write_meta(folder, meta_params(CONFIG), meta_tensors(CUT), shards)
    (folder / "params.json").write_text(json.dumps(changed))
    return folder


def an_hf(folder: Path, config: LlamaConfig = CONFIG) -> Path:
    tensors = {n: torch.from_numpy(v).float() for n, v in random_params(config, 0).items()}
    return write_hf(folder, config, tensors, 1)
