"""A small model and faulty copies of it, shared by the tests of compare.py."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from reference_np.config import LlamaConfig
from reference_np.limits import UNLIMITED, Limits
from reference_np.naming import activation_axes

from ..backends.torch_model import save_numpy
from ..conformance.strategies import cast, random_params
from ..planted.port import Planted

CONFIG = LlamaConfig(32, 2, 4, 2, 8, 48, 300, max_seq_len=2048, rope_theta=5e5)
NAMES = list(activation_axes(CONFIG))
CALLS = 7  # of the default input
# Shorter, and without decoding after the prompt: the padded run still decodes on its cache.
QUICK = ("--tokens", 8, "--steps", 0)
QUICK_CALLS = 4


def write(path: Path, config: LlamaConfig) -> Path:
    save_numpy(cast(random_params(config, 0), np.float32), path, {"config": config.to_json()})
    return path


def contents(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return the metadata and the tensors of a safetensors file."""
    with safe_open(path, framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def named(found: Mapping[str, Any]) -> list[list[str]]:
    return [[bug["name"] for bug in entry["mutants"]] for entry in found["diagnosis"]]


class Offering:
    """A backend that offers some methods of another alone, and may declare limits."""

    def __init__(self, inner: Any, *methods: str, limits: Limits = UNLIMITED) -> None:
        self.dtypes, self.limits = inner.dtypes, limits
        for name in methods:
            setattr(self, name, getattr(inner, name))


def silent(inner: Any) -> Offering:
    """Return a backend that offers another's logits alone."""
    return Offering(inner, "logits", "decode")


class Edited(Planted):
    """The planted port without a bug, with one activation changed in its trace."""

    def __init__(self, name: str, edit: Callable) -> None:
        super().__init__()
        self.name, self.edit = name, edit

    def traced_decode(self, *arguments: Any) -> Any:
        found, cache = super().traced_decode(*arguments)
        found = dict(found)
        value = self.edit(found.pop(self.name))
        return (found if value is None else found | {self.name: value}), cache
