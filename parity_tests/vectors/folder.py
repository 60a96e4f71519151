"""A folder of golden vectors: its index, a list of its cases, a copy of it.

Needs NumPy and safetensors, no PyTorch.
"""

import shutil
from pathlib import Path
from typing import Any

from llama_common.files import new_folder, remove, temporary_folder
from reference_np.config import InputError
from reference_np.weight_files import load_json

from .schema import violations

FORMAT, SCHEMA_VERSION = "llama-vectors", 1
INDEX, SCHEMA = "index.json", "vectors.schema.json"
VECTORS = Path(__file__).parent
# The files that a copy has; readers in other languages are among them. The index comes last: a
# folder without it is refused.
COPIED = ("index.txt", SCHEMA, "models", "traces", "readers", INDEX)


def load_index(folder: Path = VECTORS) -> dict[str, Any]:
    """Return the index of a folder of vectors.

    Raises InputError for none, for another version, and for one that breaks its schema.
    """
    path = folder / INDEX
    index = load_json(path)
    if index.get("format") != FORMAT:
        raise InputError(f"{path}: is no index of golden vectors; give a folder that has one")
    version = index.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: its schema version is {version!r}, and this release reads {SCHEMA_VERSION}; "
            "install the release that wrote it, or copy this one's vectors"
        )
    if wrong := violations(index, load_json(VECTORS / SCHEMA)):
        raise InputError(f"{path}: breaks {SCHEMA} ({wrong[0]}); copy the vectors again")
    return index


def list_cases(folder: Path = VECTORS) -> list[str]:
    """Return a line for each case: its name, what it needs, and a sentence."""
    cases = load_index(folder)["cases"]
    width = max((len(case["id"]) for case in cases), default=0)
    return [
        f"{case['id']:{width}}  {case['about']}"
        + (f" (needs {', '.join(case['needs'])})" if case["needs"] else "")
        for case in cases
    ]


def copy_vectors(target: Path, folder: Path = VECTORS) -> int:
    """Copy the vectors into a new or empty folder; return the number of cases.

    They are copied into a temporary folder beside it first: what fails leaves nothing there.
    Raises InputError for a target with something in it, and for one inside the vectors' folder.
    """
    index = load_index(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is there already; give a new or empty folder")
    if target.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{target}: is inside the vectors' own folder; give one outside {folder}")
    try:
        if target.is_dir():
            with temporary_folder(target.resolve()) as temporary:
                _copy(folder, temporary)
                _move(temporary, target)
        else:
            with new_folder(target) as temporary:
                _copy(folder, temporary)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return len(index["cases"])


def _copy(folder: Path, temporary: Path) -> None:
    for name in COPIED:
        inside = [folder / name, *(folder / name).rglob("*")]
        for path in [one for one in inside if one.is_file() and one.parent.name != "__pycache__"]:
            copied = temporary / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)  # without its mode: installed files may be read-only


def _move(temporary: Path, target: Path) -> None:
    """Move a folder's parts into an empty one; where one fails, none is left.

    The folder itself is not renamed: ``target`` may be a shell's current folder, which would be
    left in one that is gone, or a mount, which nothing replaces.
    """
    try:
        for name in COPIED:
            if (temporary / name).exists():
                shutil.move(temporary / name, target / name)
    except BaseException:
        for name in COPIED:
            remove(target / name)
        raise
