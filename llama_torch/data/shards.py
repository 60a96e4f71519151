"""Token shards: a folder of token ids in files of equal size, described by index.json.

A shard is a headerless array of little-endian ids: uint16 where the vocabulary fits, else uint32.
``shard_writer.prepare`` writes shards in order, each atomically, records them in progress.json,
and writes index.json last; after a kill it continues from progress.json.
"""

import os
import re
import stat
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_common.errors import InputError
from llama_common.files import read_json, require_name

from ..common.state_file import abridged, read_state, require_count, require_text

FORMAT, VERSION = "llama_torch token shards", 1

INDEX_FILE, PROGRESS_FILE, LOCK_FILE = "index.json", "progress.json", "lock"

DTYPES = {"uint16": "<u2", "uint32": "<u4"}

OPEN = 64  # shard files open at a time

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Shard:
    """One shard file: its name, its number of tokens and its checksum."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The fields of index.json; counts are in tokens."""

    dtype: str
    encoding: str  # hash of the tokenizer
    key: str  # hash of the text and of the tokenizer
    shard_tokens: int  # of every shard but the last, which may have fewer
    tokens: int
    highest: int  # id; -1 without tokens
    shards: tuple[Shard, ...]
    nulls: int = 0  # records of the text that were left out
    first_null_file: int = -1  # index of the first file with one; -1 = none


class TokenShards:
    """A folder's token ids as one sequence [index.tokens], uint16 or uint32, read by slice.

    ``shards[start:stop]`` returns an array [stop - start]. It reads with os.pread, since a mapped
    file that shrinks would end the process by SIGBUS; here that is an InputError. The constructor
    raises InputError where index or file sizes are wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.dtype = np.dtype(DTYPES[self.index.dtype])
        self._open: OrderedDict[int, int] = OrderedDict()
        for shard in self.index.shards:
            require_size(folder, shard, self.dtype.itemsize)

    def __len__(self) -> int:
        return self.index.tokens

    def __getitem__(self, where: slice) -> Ids:
        start, stop, _ = where.indices(len(self))
        size, parts = self.index.shard_tokens, [np.zeros(0, self.dtype)]
        while start < stop:
            number, first = divmod(start, size)
            last = min(first + stop - start, size)
            parts.append(self._read(number, first, last))
            start += last - first
        return np.concatenate(parts[1:]) if len(parts) > 2 else parts[-1]

    def _read(self, number: int, first: int, last: int) -> Ids:
        shard, width = self.index.shards[number], self.dtype.itemsize
        try:
            data = os.pread(self._handle(number), (last - first) * width, first * width)
        except OSError as error:
            raise _unusable(self.folder / shard.name, f"cannot be read ({error})") from None
        if len(data) < (last - first) * width:
            raise _unusable(self.folder / shard.name, "was cut short while it was in use")
        ids = np.frombuffer(data, self.dtype)
        # The vocabulary was compared with the index: an id beyond would be read out of bounds.
        if len(ids) and int(ids.max()) > self.index.highest:
            beyond = f"holds token id {ids.max()}, above {self.index.highest} in {INDEX_FILE}"
            raise _unusable(self.folder / shard.name, beyond)
        return ids

    def _handle(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) == OPEN:
            os.close(self._open.popitem(last=False)[1])
        shard = self.index.shards[number]
        require_size(self.folder, shard, self.dtype.itemsize)
        self._open[number] = os.open(self.folder / shard.name, os.O_RDONLY)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # file descriptors belong to this process

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            os.close(handle)


def require_size(folder: Path, shard: Shard, width: int) -> None:
    """Raise InputError unless a shard's file has its tokens of ``width`` bytes each."""
    path, expected = folder / shard.name, shard.tokens * width
    try:
        found = path.stat()
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    if found.st_size != expected or not stat.S_ISREG(found.st_mode):
        raise _unusable(path, f"has {found.st_size} bytes and should have {expected}")


def _unusable(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: token shard {what}; copy it back, or delete {path.parent} and tokenise again"
    )


def is_shards(folder: Path) -> bool:
    """Return whether a folder holds token shards, complete or not; the index may be damaged."""
    # os.path, unlike Path, takes a name that is too long for one of no file.
    if any(os.path.isfile(folder / name) for name in (PROGRESS_FILE, shard_name(0))):
        return True
    try:
        return read_json(folder / INDEX_FILE).get("format") == FORMAT
    except InputError:
        return False


def read_index(folder: Path) -> Index:
    """Read index.json; raise InputError where it is missing, damaged or inconsistent."""
    require_name(folder)
    path = folder / INDEX_FILE
    if not os.path.isfile(path) and os.path.isfile(folder / PROGRESS_FILE):
        raise InputError(
            f"{folder}: its text is not wholly tokenised; run the command that began it again"
        )
    remedy = f"copy it back, or delete {folder} and tokenise again"
    found, _ = read_state(path, remedy)
    if (found.pop("format", None), found.pop("version", None)) != (FORMAT, VERSION):
        raise InputError(f"{path}: is not of format {FORMAT!r} {VERSION}; tokenise the text")
    try:
        require_fields(Index, found)
        index = Index(**found | {"shards": parse_shards(found["shards"])})
        _require_consistent(index)
    except ValueError as error:
        raise InputError(f"{path}: damaged index ({error}); {remedy}") from None
    return index


def require_fields(kind: type[Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError unless an object has the fields of a dataclass; defaults may be missing."""
    known = {field.name: field.default is not MISSING for field in fields(kind)}
    for name in found:
        if name not in known:
            raise ValueError(f"{abridged(name)} is no key of it")
    for name, has_default in known.items():
        if name not in found and not has_default:
            raise ValueError(f"{name} is missing")


def parse_shards(found: Any) -> tuple[Shard, ...]:
    """Return the shards of a list of objects; raise ValueError for one that is not as written."""
    if not isinstance(found, list):
        raise ValueError(f"shards is {abridged(found)}")
    return tuple(_parse_shard(number, entry) for number, entry in enumerate(found))


def _parse_shard(number: int, entry: Any) -> Shard:
    if not isinstance(entry, dict):
        raise ValueError(f"shard {number} is {abridged(entry)}")
    require_fields(Shard, entry)
    if entry["name"] != shard_name(number):
        raise ValueError("its shards are not named in order")
    require_count(f"tokens of shard {number}", entry["tokens"], 1)
    digest = require_text(f"sha256 of shard {number}", entry["sha256"])
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"sha256 of shard {number} is {abridged(digest)}")
    return Shard(**entry)


def _require_consistent(index: Index) -> None:
    """Raise ValueError where an index is inconsistent."""
    for name in ("dtype", "encoding", "key"):
        require_text(name, getattr(index, name))
    for name in ("tokens", "nulls"):
        require_count(name, getattr(index, name))
    if index.dtype not in DTYPES or not index.shard_tokens:
        raise ValueError(
            f"dtype {abridged(index.dtype)}, {abridged(index.shard_tokens)} tokens a shard"
        )
    require_count("shard_tokens", index.shard_tokens, 1)
    largest = int(np.iinfo(DTYPES[index.dtype]).max)
    require_count("highest", index.highest, *((0, largest) if index.tokens else (-1, -1)))
    require_nulls(index.nulls, index.first_null_file)
    whole, rest = divmod(index.tokens, index.shard_tokens)
    # Compared before a list is made of the number.
    n_shards = whole + (rest > 0)
    expected = len(index.shards) == n_shards and [index.shard_tokens] * whole + [rest] * (rest > 0)
    if [shard.tokens for shard in index.shards] != expected:
        raise ValueError(f"its shards do not add up to {index.tokens} tokens")


def require_nulls(nulls: int, first_null_file: int) -> None:
    """Raise ValueError for a count of nulls without a first file, or the other way round."""
    require_count("nulls", nulls)
    require_count("first_null_file", first_null_file, -1)
    if (nulls > 0) != (first_null_file >= 0):
        raise ValueError(f"{nulls} nulls, and first_null_file {first_null_file}")


def shard_name(number: int) -> str:
    """Return the name of the shard's file of that number, from 0."""
    return f"{number:05d}.bin"
