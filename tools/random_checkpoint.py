"""Write a checkpoint of random weights in a Llama 2's shape, to measure speed and memory with.

``python tools/random_checkpoint.py /tmp/llama7b --shape 7b``. Each layer is a shard, drawn and
written in the memory of one.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while modules are imported: see llama_common/interrupt.py. cli.run takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from llama_common import cli
from llama_common.errors import InputError, check
from llama_common.files import atomic_write, write_text
from llama_common.memory import gib
from llama_torch.checkpoint.file_names import INDEX_FILE
from llama_torch.model.config import ModelConfig
from llama_torch.model.shapes import ParameterShapes, parameter_count
from tools.shapes import SHAPES

if TYPE_CHECKING:
    import torch

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
LLAMA_2 = {  # Llama 2 paper, table 1, and its released configs: none ties its head
    "7b": SHAPES["7b"],
    "13b": ModelConfig(5120, 40, 40, 40, 128, 13824, 32000, 4096, tie_embeddings=False),
    "70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, 4096, tie_embeddings=False),
}


@dataclass(frozen=True)
class ShapeConfig:
    """Write a sharded checkpoint of random weights."""

    command: ClassVar[str] = "python tools/random_checkpoint.py"

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory to write; it must not hold a model yet."""
    shape: Literal["7b", "13b", "70b"] = "7b"
    """Which Llama 2."""
    n_layers: int = 0
    """Layers; 0 = as many as it has."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the file."""
    seed: int = 0
    """Seed of the weights."""

    def __post_init__(self) -> None:
        check(self.n_layers >= 0, "n_layers", self.n_layers, "must not be negative")
        check(0 <= self.seed < 2**63, "seed", self.seed, "must lie between 0 and 2^63 - 1")


def write(out: Path, config: ModelConfig, dtype: "torch.dtype", seed: int) -> None:
    """Write config.json, the index and the shards, drawn from the trainer's initialisation.

    Matrices are N(0, 0.02^2), residual projections 0.02 / sqrt(2 n_layers); vectors are ones.
    """
    # They take seconds to import: a wrong flag or directory is told before.
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shapes = ParameterShapes(config)
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / math.sqrt(2 * config.n_layers)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = f"layer-{int(name.split('.')[2]):03}" if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            drawn = torch.ones(shapes[name])
            if drawn.ndim > 1:
                drawn.normal_(0.0, residual_std if is_residual else 0.02, generator=generator)
            tensors[name] = drawn.to(dtype)
        try:
            atomic_write(out / file, partial(save_file, tensors))
        except SafetensorError as error:
            raise InputError(
                f"{out / file}: cannot be written ({error}); make room for it"
            ) from None
    weight_map = {name: file for file, names in shards.items() for name in names}
    write_text(out / INDEX_FILE, json.dumps({"weight_map": weight_map}))
    write_text(out / "config.json", json.dumps(config.to_hf(), indent=2))


def require_room(out: Path, config: ModelConfig, settings: ShapeConfig) -> None:
    """Raise InputError where the disk has no room for a checkpoint of this shape."""
    needed = parameter_count(config) * BYTES[settings.dtype]
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
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(ShapeConfig, argv)
    config = LLAMA_2[settings.shape]
    if settings.n_layers:
        config = dataclasses.replace(config, n_layers=settings.n_layers)
    out = Path(settings.out)
    if any(out.glob("*.safetensors")):
        raise InputError(f"{out}: already holds a model; give another directory")
    require_room(out, config, settings)
    out.mkdir(parents=True, exist_ok=True)
    import torch  # takes seconds: a wrong directory is told before

    write(out, config, getattr(torch, settings.dtype), settings.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
