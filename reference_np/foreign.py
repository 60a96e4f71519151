"""Name what stands in place of a model that was asked for, and the remedy."""

import os
import re
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from .config import InputError

MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

META_FILES = "consolidated.[0-9][0-9].pth"

STATE_FILE, METADATA_FILE = "training_state.safetensors", ".metadata"  # of the trainer

GIVE = "give a model directory or a .safetensors file"

ADAPTER = "adapter_config.json"

RUN_FILE = "run.json"  # of the trainer

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z][\w.-]*")

# Ending of a file's name -> what the file is, and what to give in its place.
OTHER_KINDS = {
    ".gguf": "a GGUF file; convert it, python tools/convert.py FILE DIR, and give DIR",
    ".onnx": "an ONNX file; give the Hugging Face directory that it was exported from",
}

PICKLES = (".bin", ".pth", ".pt")

UNPICKLE = (
    "a pickle may run code, so read it with torch.load(..., weights_only=True), which runs none, "
    "and write the tensors with safetensors.torch.save_file(tensors, ..., {'format': 'pt'})"
)

MOST_SHOWN, MOST_SEARCHED = 3, 1000


def missing(path: Path) -> InputError:
    """Return the error for a path that does not exist; it may be a name on Hugging Face's hub."""
    name = str(path)
    if not HUB_NAME.fullmatch(name) or path.suffix == ".safetensors" or path.parent.exists():
        return InputError(f"{path}: no such file; {GIVE}")
    return InputError(
        f"{path}: no such file; {GIVE}. Nothing is downloaded here: a model on Hugging Face's hub "
        f"is fetched by hf download {name} --local-dir {path.name}, then give {path.name}"
    )


def require_readable(path: Path) -> None:
    """Raise InputError for a file that is there and cannot be opened.

    The reader of safetensors says of it that it is not there.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give yourself the right to read it"
        ) from None


def require_no_other_kind(path: Path) -> None:
    """Raise InputError for a file that is no safetensors file by its name or its first bytes.

    A shard of a model is refused too where the others' index stands beside it.
    """
    kind = path.suffix.lower()
    if path.is_file() and kind != ".gguf":
        require_readable(path)
        with path.open("rb") as file:
            kind = ".gguf" if file.read(4) == b"GGUF" else kind
    if kind in OTHER_KINDS:
        raise InputError(f"{path}: is {OTHER_KINDS[kind]}")
    if path.match(META_FILES):
        raise InputError(f"{path}: is in Meta's form; {_convert(path.parent)}")
    if kind in PICKLES:
        raise InputError(f"{path}: is no .safetensors file; {UNPICKLE}")
    shard = SHARD.search(path.name)
    is_one_of_several = shard and int(shard[1]) > 1 and (path.parent / INDEX_FILE).is_file()
    if kind in (".json", ".model") or is_one_of_several:
        holds = "one part of the weights" if shard else "no weights"
        raise InputError(f"{path}: holds {holds}; give its directory, {path.parent}")


def explain_absence(folder: Path) -> InputError:
    """Return the error for a directory without weights of Hugging Face's form."""
    found = _what_it_is(folder)
    return InputError(
        f"{folder}: {found}" if found else f"{folder / MODEL_FILE}: no such file; {GIVE}"
    )


def _what_it_is(folder: Path) -> str:
    """Return what a directory holds in place of a model, and the remedy; "" where it is unknown."""
    names = sorted(entry.name for entry in islice(folder.iterdir(), MOST_SEARCHED))
    by_ending = {kind: [n for n in names if n.lower().endswith(kind)] for kind in OTHER_KINDS}
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [n for n in names if re.fullmatch(r"pytorch_model.*\.bin|.*\.pth?", n)]
    if any(folder.glob(META_FILES)):
        return f"is in Meta's form; {_convert(folder)}"
    if ADAPTER in names:
        return (
            f"is an adapter ({ADAPTER}) without its base model; merge it into that first (in peft: "
            "merge_and_unload, then save_pretrained)"
        )
    if STATE_FILE in names or METADATA_FILE in names:
        return "holds what a training run continues from; give the run's directory"
    if RUN_FILE in names:
        return "is a run that has saved no model yet; continue it with llama_torch.train --resume"
    if pickles:
        return f"holds {pickles[0]} and no {MODEL_FILE}; {UNPICKLE}"
    for kind, found in by_ending.items():
        if found:
            return f"holds {found[0]}, {OTHER_KINDS[kind]}"
    if len(tensors) == 1 and not SHARD.search(tensors[0]):
        return f"holds no {MODEL_FILE}; give the file itself, {folder / tensors[0]}"
    if tensors:
        return f"holds {tensors[0]} and no {INDEX_FILE} that names all parts; copy that too"
    if below := list(_models_below(folder)):
        shown = " or ".join(map(str, below[:MOST_SHOWN]))
        more = f" or {len(below) - MOST_SHOWN} more" if len(below) > MOST_SHOWN else ""
        return f"holds no model itself; give {shown}{more}"
    return ""


def _models_below(folder: Path) -> Iterator[Path]:
    """Yield the directories one level below, or in snapshots/, that hold a model, by name."""
    for parent in (folder, folder / "snapshots"):
        if parent.is_dir():
            for path in sorted(islice(parent.iterdir(), MOST_SEARCHED)):
                if any((path / name).is_file() for name in (MODEL_FILE, INDEX_FILE)):
                    yield path


def _convert(folder: Path) -> str:
    """Return the command that converts Meta's form."""
    source = str(folder)
    target = (source if folder.name not in ("", "..") else os.path.abspath(folder)) + "-hf"
    command = shlex.join(["python", "tools/convert.py", source, target])
    return f"convert it, {command}, and give {target}"
