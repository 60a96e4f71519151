"""Read the index of a checkpoint's shards, a pickle, as plain data: nothing in it is called.

torch.distributed.checkpoint unpickles ``.metadata``, which runs whatever functions the file names.
Here each class that torch writes there is replaced by a record of its arguments and state, any
other name is refused, and torch's objects are built anew from the records, once checked.
"""

import io
import math
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from llama_common.errors import InputError

from ..common.state_file import abridged
from .file_names import METADATA_FILE

CLASSES = "torch.distributed.checkpoint.metadata"


class _Record:
    """An object of the pickle: the state it was written with."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        """Keep nothing: what is written with arguments (paths, layouts) is not read."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Record): ...


class _Tensor(_Record): ...


class _Properties(_Record): ...


class _Chunk(_Record): ...


class _Key(_Record): ...


class _Location(_Record): ...


# What torch 2.6 to 2.13 write, by module and name.
RECORDS: dict[tuple[str, str], type] = {
    (CLASSES, "Metadata"): _Metadata,
    (CLASSES, "TensorStorageMetadata"): _Tensor,
    (CLASSES, "TensorProperties"): _Properties,
    (CLASSES, "ChunkStorageMetadata"): _Chunk,
    (CLASSES, "MetadataIndex"): _Key,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Location,
    ("torch", "Size"): tuple,
    (CLASSES, "StorageMeta"): _Record,
    (CLASSES, "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,  # Python 3.13
    ("builtins", "getattr"): _Record,  # how some releases of Python 3.11 write an enum's member
}


class _ForeignNameError(Exception):
    """The pickle names what no index of shards holds."""


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Builds records, tuples and dtypes; every other name is refused before it is looked up.

    Python's own unpickler and not C's, which takes gigabytes where a few bytes name a place in its
    table. Dicts have texts and records as keys: the hash of a tuple of tuples may never end.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_PythonUnpickler.dispatch)

    def load_setitem(self) -> None:
        """Add one entry to a dict."""
        self._require_plain_keys([self.stack[-2]])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Add the entries since the last mark to a dict."""
        self._require_plain_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        """Make a dict of the entries since the last mark."""
        self._require_plain_keys(self.stack[::2])
        super().load_dict()

    def refuse_set(self) -> None:
        """Refuse a set, which no index holds."""
        raise ValueError("a set")

    def _require_plain_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if not isinstance(key, str | _Record):
                raise ValueError(f"a key of type {type(key).__name__}")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.EMPTY_SET[0]] = refuse_set
    dispatch[pickle.ADDITEMS[0]] = refuse_set
    dispatch[pickle.FROZENSET[0]] = refuse_set

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            return RECORDS[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _ForeignNameError(f"{module}.{name}")


class Location(NamedTuple):
    """Where a chunk's bytes stand, with the attributes that torch's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def read_index(folder: Path) -> Metadata:
    """Return the index of the shards in ``folder``: tensors alone, each covered by its chunks.

    Raises InputError for a file that is damaged, and for one that names a function or a class
    beyond those of an index; no code of it runs.
    """
    path = folder / METADATA_FILE
    try:
        # From memory: a length that the pickle claims is no larger there than what is left.
        return _metadata(_Unpickler(io.BytesIO(path.read_bytes())).load())
    except _ForeignNameError as error:
        raise InputError(
            f"{path}: refused, since it names {error}, which is no part of a checkpoint and may "
            "run code; take the run from a source that you trust"
        ) from None
    except Exception as error:  # damaged pickles raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{folder}: not a complete checkpoint ({reason}); put back what is missing"
        ) from None


def require_backed(folder: Path, index: Metadata) -> None:
    """Raise InputError for a tensor whose bytes the files in ``folder`` are too short for.

    Its shape is believed before it is read.
    """
    sizes: dict[str, int] = {}
    used: dict[str, int] = {}
    for name, entry in index.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks:
            place = index.storage_data[MetadataIndex(name, chunk.offsets)]
            path, file = folder / place.relative_path, place.relative_path
            if file not in sizes:
                sizes[file] = _regular_size(path)
            needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            used[file] = used.get(file, 0) + needed  # two that claim the same bytes count twice
            fits = needed <= place.length <= sizes[file] - place.offset
            if not fits or used[file] > sizes[file]:
                raise InputError(
                    f"{path}: is too short for {name}, so this is not a complete checkpoint; put "
                    "back what is missing"
                )


def _regular_size(path: Path) -> int:
    """Return a file's size; raise InputError for what is none, a pipe for instance."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), so this is not a complete checkpoint; put "
            "back what is missing"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is no regular file; put back the one that was there")
    return found.st_size


def _metadata(record: Any) -> Metadata:
    state = _state(record, _Metadata)
    entries = _items(state, "state_dict_metadata")
    tensors = {_text(name): _tensor(name, entry) for name, entry in entries}
    places = {_key(key): _location(entry) for key, entry in _items(state, "storage_data")}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in places:
                _wrong(f"no place for a part of {name}")
    # planner_data repeats the tensors' names.
    return Metadata(dict(tensors), None, places, StorageMeta())


def _items(state: dict[str, Any], table: str) -> Any:
    entries = state.get(table)
    return entries.items() if isinstance(entries, dict) else _wrong(f"no {table}")


def _tensor(name: str, record: Any) -> TensorStorageMetadata:
    state = _state(record, _Tensor)
    properties, size = state.get("properties"), _size(state.get("size"))
    written = properties.state if isinstance(properties, _Properties) else None
    if not isinstance(written, tuple) or not isinstance(written[0], torch.dtype):
        _wrong(f"{name} has no dtype")
    chunks = [_chunk(chunk) for chunk in state.get("chunks", ())]
    for chunk in chunks:
        ends = [start + n for start, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > n for end, n in zip(ends, size, strict=True)):
            _wrong(f"a part of {name} lies outside of it")
    # What no chunk covers would be read as memory that was never written.
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        _wrong(f"{name} is not covered by its parts")
    return TensorStorageMetadata(TensorProperties(dtype=written[0]), size, chunks)


def _chunk(record: Any) -> ChunkStorageMetadata:
    state = _state(record, _Chunk)
    return ChunkStorageMetadata(_size(state.get("offsets")), _size(state.get("sizes")))


def _key(record: Any) -> MetadataIndex:
    state = _state(record, _Key)
    index = state.get("index")
    if not isinstance(index, int | None):
        _wrong("an index that is no number")
    return MetadataIndex(_text(state.get("fqn")), _size(state.get("offset")), index)


def _location(record: Any) -> Location:
    state = _state(record, _Location)
    name, start, length = (state.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or name == ".." or Path(name).name != name:
        _wrong(f"{abridged(name)} is not the name of a file beside it")
    if state.get("transform_descriptors"):
        _wrong("its shards are compressed, which no run of this package writes")
    return Location(name, *_size((start, length)))


def _state(record: Any, kind: type[_Record]) -> dict[str, Any]:
    """Return the fields of a record of ``kind``."""
    if type(record) is not kind or not isinstance(record.state, dict):
        _wrong(f"{type(record).__name__.strip('_')} in place of {kind.__name__.strip('_')}")
    return record.state


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        _wrong("a size that is none")
    return torch.Size(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _wrong("a name that is no text")


def _wrong(why: str) -> NoReturn:
    raise ValueError(why)
