"""Write a checkpoint of random weights: a tiny one to compare with, or in a Llama 2's shape.

``python -m llama_parity.random_checkpoint DIR --shape tiny`` takes a second. The large ones are to
measure speed and memory with; each layer is a shard, drawn and written in the memory of one.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from llama_common import cli
from llama_common.errors import InputError, check
from llama_common.files import atomic_write, write_text
from llama_common.memory import gib
from reference_np.config import LlamaConfig
from reference_np.foreign import INDEX_FILE
from reference_np.naming import layer_shapes, outer_shapes, parameter_shapes

from .running import run

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SHAPES = {
    # An epsilon and a base that no port has written into its code.
    "tiny": LlamaConfig(128, 2, 8, 4, 16, 344, 1024, 2048, norm_eps=2**-12, rope_theta=37500.0),
    # Llama 2 paper, table 1, and its released configs: none ties its head.
    "7b": LlamaConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "13b": LlamaConfig(5120, 40, 40, 40, 128, 13824, 32000, 4096),
    "70b": LlamaConfig(8192, 80, 64, 8, 128, 28672, 32000, 4096),
}
METADATA = {"format": "pt"}  # what transformers asks for
# Of a scaled rotary embedding: some frequencies are scaled, some mixed, some left.
SCALED = {"rope_factor": 8.0, "rope_original_max_seq_len": 256}


@dataclass(frozen=True)
class ShapeConfig:
    """Write a sharded checkpoint of random weights."""

    command: ClassVar[str] = "python tools/random_checkpoint.py"

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory to write; it must not hold a model yet."""
    shape: Literal["tiny", "7b", "13b", "70b"] = "7b"
    """tiny (1.3 MB, to compare with) or which Llama 2."""
    n_layers: int = 0
    """Layers; 0 = as many as it has."""
    head_dim: int = 0
    """Width of a head; 0 = dim / n_heads."""
    n_kv_heads: int = 0
    """Key/value heads, a divisor of the query heads; 0 = as many as it has."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """Scaling of the rotary frequencies."""
    tied: bool = False
    """Let the head share the embedding's weights."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the file."""
    seed: int = 0
    """Seed of the weights."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "head_dim", "n_kv_heads"):
            value = getattr(self, name)
            check(value >= 0, name, value, "must not be negative")
            check(value < 2**31, name, value, "must be below 2^31")
        check(0 <= self.seed < 2**63, "seed", self.seed, "must lie between 0 and 2^63 - 1")


def model_config(settings: ShapeConfig) -> LlamaConfig:
    """Return the architecture that the settings ask for."""
    given = {
        name: getattr(settings, name)
        for name in ("n_layers", "head_dim", "n_kv_heads")
        if getattr(settings, name)
    }
    scaled: dict[str, Any] = {} if settings.rope_type == "default" else dict(SCALED)
    if settings.rope_type == "linear":
        del scaled["rope_original_max_seq_len"]
    return dataclasses.replace(
        SHAPES[settings.shape],
        **given,
        **scaled,
        rope_type=settings.rope_type,
        tie_embeddings=settings.tied,
    )


def write(out: Path, config: LlamaConfig, dtype: str, seed: int, spread: bool = False) -> None:
    """Write config.json, the index and the shards; the directory must be there.

    Matrices are N(0, 0.02^2), residual projections 0.02 / sqrt(2 n_layers), and vectors ones, as
    the trainer initialises them. ``spread`` keeps activations near one instead, so that every bug
    shows: matrices [out, in] are N(0, 1 / in), embeddings N(0, 1), vectors N(1, 0.3^2).
    """
    # They take a while to import: a wrong flag or directory is told before.
    import ml_dtypes
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    shapes = parameter_shapes(config)
    generator = np.random.default_rng(seed)
    shards: dict[str, list[str]] = {}
    size = 0
    for name in shapes:
        part = f"layer-{int(name.split('.')[2]):03}" if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            mean, std = _distribution(name, shapes[name], config, spread)
            drawn = np.full(shapes[name], mean, np.float32)
            if std:
                drawn += np.float32(std) * generator.standard_normal(shapes[name], np.float32)
            tensors[name] = drawn.astype(stored)
            size += tensors[name].nbytes
        try:
            atomic_write(out / file, partial(save_file, tensors, metadata=dict(METADATA)))
        except SafetensorError as error:
            raise InputError(
                f"{out / file}: cannot be written ({error}); make room for it"
            ) from None
    weight_map = {name: file for file, names in shards.items() for name in names}
    # transformers loads no index without its metadata.
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_text(out / INDEX_FILE, json.dumps(index))
    write_text(out / "config.json", json.dumps(config.to_hf() | {"dtype": dtype}, indent=2))


def _distribution(
    name: str, shape: tuple[int, ...], config: LlamaConfig, spread: bool
) -> tuple[float, float]:
    """Return the mean and the standard deviation of a parameter's elements."""
    if len(shape) == 1:
        return 1.0, 0.3 if spread else 0.0
    if spread:
        return 0.0, 1.0 if "embed" in name else shape[1] ** -0.5
    is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return 0.0, 0.02 / math.sqrt(2 * config.n_layers) if is_residual else 0.02


def require_room(out: Path, config: LlamaConfig, settings: ShapeConfig) -> None:
    """Raise InputError where the disk has no room for a checkpoint of this shape."""
    of_layer, others = (
        sum(math.prod(shape) for shape in shapes.values())
        for shapes in (layer_shapes(config), outer_shapes(config))
    )
    needed = (config.n_layers * of_layer + others) * BYTES[settings.dtype]
    there = Path(os.path.abspath(out))
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"--shape {settings.shape} with {config.n_layers} layers takes {gib(needed)}, and the "
            f"disk of {out} has {gib(free)} free; choose fewer --n-layers, or another disk"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(ShapeConfig, argv)
    config = model_config(settings)
    out = Path(settings.out)
    if any(out.glob("*.safetensors")):
        raise InputError(f"{out}: already holds a model; give another directory")
    require_room(out, config, settings)
    out.mkdir(parents=True, exist_ok=True)
    write(out, config, settings.dtype, settings.seed, spread=settings.shape == "tiny")
    return 0


if __name__ == "__main__":
    sys.exit(main())
