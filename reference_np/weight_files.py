"""Find and open the safetensors files of a model, without NumPy: a command's quick refusals."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .config import InputError
from .foreign import (
    INDEX_FILE,
    MODEL_FILE,
    explain_absence,
    missing,
    require_no_other_kind,
    require_readable,
)
from .naming import EMBED, LM_HEAD

if TYPE_CHECKING:
    from numpy.typing import NDArray


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a directory, sorted by name, or [path] for a file.

    Raises InputError for a path that is neither, naming what it is instead.
    """
    if not os.path.exists(path):  # false for a name that no file can have
        raise missing(path)
    if not path.is_dir():
        require_no_other_kind(path)
        return [path]
    index, single = path / INDEX_FILE, path / MODEL_FILE
    if not index.is_file() and not single.is_file():
        raise explain_absence(path)
    # Beside a whole model an index is of an earlier save; transformers reads the model too.
    if single.is_file():
        return [single]
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; save the checkpoint again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: {shard!r} is not the name of a file beside it; correct it")
    return [path / name for name in sorted(set(weight_map.values()))]


def require_weights(path: Path) -> list[Path]:
    """Return a checkpoint's weight files; InputError unless each has a safetensors header."""
    return [Header(file).path for file in weight_files(path)]


class Header:
    """Metadata, names, shapes and dtypes of one safetensors file, without its data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isfile(path):  # false for a name that no file can have
            raise InputError(f"{path}: no such file; give a .safetensors file or its directory")
        require_readable(path)
        try:
            with safe_open(path, framework="np") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self.dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: not a complete safetensors file ({error}); save or copy it again"
            ) from None

    def stored_name(self, name: str) -> str:
        """Return a parameter's name in the file; a tied embedding may be stored as the head."""
        return LM_HEAD if name == EMBED and EMBED not in self.shapes else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.shapes[self.stored_name(name)]

    def read(self, name: str) -> "NDArray[Any]":
        """Return a parameter as it is stored."""
        # Opened anew each time: the memory map goes away with the tensor's last use, so that
        # a file of any size is read in the memory of its largest tensor.
        with safe_open(self.path, framework="np") as file:
            tensor: NDArray[Any] = file.get_tensor(self.stored_name(name))
        return tensor


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; InputError names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Return the JSON object in a text; InputError names its ``source``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not JSON ({error}); write it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: is not a JSON object; write it again")
    return value
