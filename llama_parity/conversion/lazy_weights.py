"""A checkpoint as weights that are read one at a time, and the writing of files of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import Tensor

from llama_common.errors import InputError
from llama_torch.model.config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """One parameter, its rows in Hugging Face's order, not yet read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """A checkpoint of either form: its config, and its weights by their Hugging Face names."""

    config: ModelConfig
    weights: dict[str, Weight]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every matrix; vectors may be wider, as in GGUF files."""
        matrices = (w.dtype for w in self.weights.values() if len(w.shape) > 1)
        return reduce(torch.promote_types, matrices)


def stored(name: str, weight: Weight, dtype: torch.dtype | None) -> Tensor:
    """Read a weight in the dtype to be stored; InputError if its values do not fit there."""
    tensor = weight.read()
    if dtype in (None, tensor.dtype):
        return tensor
    other = tensor.to(dtype)
    narrower = torch.finfo(other.dtype).max < torch.finfo(tensor.dtype).max
    if narrower and torch.any(other.isinf() & tensor.isfinite()):
        raise InputError(f"{name}: too large for --dtype {label(dtype)}; use float32 or bfloat16")
    return other


def label(dtype: torch.dtype | None) -> str:
    """Return a dtype's name as config.json has it."""
    return str(dtype).removeprefix("torch.")


def with_progress(names: Sequence[str] | Mapping[str, object], what: str) -> Iterator[str]:
    """Yield names, under a progress bar where stderr is a terminal."""
    console = Console(stderr=True)
    disable = not console.is_terminal
    yield from track(list(names), what, console=console, disable=disable, transient=True)


def write_file(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a file; InputError, which names it, where there is no room."""
    try:
        save(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path.name}: cannot be written ({reason}); make room for it") from None
