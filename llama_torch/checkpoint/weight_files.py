"""Find and open the weight files of a model directory."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llama_common.errors import InputError
from llama_common.files import read_json, require_name, require_no_pointer, require_readable
from llama_common.notes import note

from .file_names import AROUND, INDEX_FILE, MODEL_FILE
from .foreign import explain_absence, missing, require_no_other_kind


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a directory, sorted by name, or [path] for a file.

    Raises InputError for a path that is neither, naming what it is instead.
    """
    require_name(path)
    if not path.exists():
        raise missing(path)
    if not path.is_dir():
        require_no_other_kind(path)
        return [path]
    index, single = path / INDEX_FILE, path / MODEL_FILE
    if not index.is_file():
        if not single.is_file():
            raise explain_absence(path)
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; save the checkpoint again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: {shard!r} is not the name of a file beside it; correct it")
    names = sorted(set(weight_map.values()))
    if single.is_file() and names != [MODEL_FILE]:
        # As transformers reads it: it leaves the index of an earlier save where it was.
        note(f"{single} is read; {INDEX_FILE} beside it names other files, which are not")
        return [single]
    for name in names:
        require_name(path / name)
    return [path / name for name in names]


def require_weights(path: Path) -> list[Path]:
    """Return a checkpoint's weight files; InputError unless each has a safetensors header.

    Commands call it before they import torch, which takes seconds.
    """
    files = weight_files(path)
    for file in files:
        with open_safetensors(file, "np"):
            pass
    return files


def model_digest(folder: Path) -> str:
    """Return the hash of a model directory: its weights, config, tokenizer and template.

    Of a run directory what training alone needs is left out.
    """
    digest = hashlib.sha256()
    around = [folder / name for name in ("config.json", *AROUND)]
    for path in [*weight_files(folder), *(path for path in around if path.is_file())]:
        digest.update(f"{path.name} ".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[safe_open]:
    """Open a safetensors file, whose tensors are PyTorch's; InputError if it is missing or damaged.

    Its header alone is read before a tensor is asked for; torch is imported unless ``framework``
    is another.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a model directory or a .safetensors file")
    require_readable(path)
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        require_no_pointer(path)
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); save or copy it again"
        ) from None
