"""Find the weight files of a model directory."""

from pathlib import Path

from ..common.errors import InputError
from ..common.files import read_json
from ..common.notes import note
from .file_names import INDEX_FILE, MODEL_FILE
from .foreign import explain_absence, missing, require_no_other_kind


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a directory, sorted by name, or [path] for a file.

    Raises InputError for a path that is neither, naming what it is instead.
    """
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
    return [path / name for name in names]
