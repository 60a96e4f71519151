"""Token shards: a folder of token ids in files of equal size, described by index.json.

A shard is a headerless array of little-endian ids: uint16 where the vocabulary fits, else uint32.
``shard_writer.prepare`` writes shards in order, each atomically, records them in progress.json,
and writes index.json last; after a kill it continues from progress.json.
"""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import InputError
from ..common.files import read_json
from ..tokenizer.gpt2 import RANKS_SHA256

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
    encoding: str  # hash of the encoding's ranks
    key: str  # hash of the text and of the encoding
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
        return np.frombuffer(data, self.dtype)

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
        found = path.stat().st_size
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    if found != expected:
        raise _unusable(path, f"has {found} bytes and should have {expected}")


def _unusable(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: token shard {what}; copy it back, or delete {path.parent} and tokenise again"
    )


def is_shards(folder: Path) -> bool:
    """Return whether a folder holds token shards, complete or not; the index may be damaged."""
    if (folder / PROGRESS_FILE).is_file() or (folder / shard_name(0)).is_file():
        return True
    try:
        return read_json(folder / INDEX_FILE).get("format") == FORMAT
    except InputError:
        return False


def read_index(folder: Path) -> Index:
    """Read index.json; raise InputError where it is missing, damaged or inconsistent."""
    path = folder / INDEX_FILE
    if not path.is_file() and (folder / PROGRESS_FILE).is_file():
        raise InputError(
            f"{folder}: its text is not wholly tokenised; run the command that began it again"
        )
    try:
        found = read_json(path)
        if (found.pop("format", None), found.pop("version", None)) != (FORMAT, VERSION):
            raise InputError(f"{path}: is not of format {FORMAT!r} {VERSION}; tokenise the text")
        index = Index(**found | {"shards": tuple(Shard(**shard) for shard in found["shards"])})
        _require_consistent(index)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: damaged index ({error}); copy it back, or delete {folder} and tokenise again"
        ) from None
    if index.encoding != RANKS_SHA256:
        raise InputError(f"{path}: holds ids of another encoding than GPT-2's; tokenise the text")
    return index


def _require_consistent(index: Index) -> None:
    """Raise ValueError where an index is inconsistent."""
    for name, kind in Index.__annotations__.items():
        if kind in (int, str) and type(getattr(index, name)) is not kind:
            raise ValueError(f"{name} is {getattr(index, name)!r}")
    if index.dtype not in DTYPES or index.shard_tokens < 1:
        raise ValueError(f"dtype {index.dtype!r}, {index.shard_tokens} tokens a shard")
    whole, rest = divmod(index.tokens, index.shard_tokens)
    expected = [index.shard_tokens] * whole + [rest] * (rest > 0)
    if [shard.tokens for shard in index.shards] != expected:
        raise ValueError(f"its shards do not add up to {index.tokens} tokens")
    if [shard.name for shard in index.shards] != [shard_name(i) for i in range(len(expected))]:
        raise ValueError("its shards are not named in order")


def shard_name(number: int) -> str:
    """Return the name of the shard's file of that number, from 0."""
    return f"{number:05d}.bin"


def damaged_shards(shards: TokenShards) -> list[str]:
    """Return the names of the shards whose checksum is not the index's; reads every shard."""
    found = []
    for shard in shards.index.shards:
        with (shards.folder / shard.name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                found.append(shard.name)
    return found
