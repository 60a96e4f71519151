"""Read the header of a GGUF file: its metadata, and where each tensor lies.

Every size that the file claims is compared with its real one before anything is allocated. The
format is that of ggml's documentation (docs/gguf.md): little-endian, version 2 or 3.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from llama_common.errors import InputError
from llama_common.files import require_no_pointer

from .file_kinds import MAGIC

VERSIONS = (2, 3)
COPY = "copy it again"
STRING, LIST, BOOL = 8, 9, 7
# The numbers of ggml's types of values -> NumPy's types.
SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
# Types of values, as a message names one and several; NumPy's kinds of lists that have them.
TYPES: dict[type, tuple[str, str, str]] = {
    int: ("an integer", "integers", "iu"),
    float: ("a float", "floats", "f"),
    bool: ("true or false", "booleans", "b"),
    str: ("a string", "strings", ""),
}
MOST_AXES, LONGEST_NAME = 4, 64  # of a tensor; ggml's own limits
ALIGNMENT = 32  # of tensors, unless general.alignment says another
T = TypeVar("T", int, float, bool, str)


class StorageType(NamedTuple):
    """How ggml stores the elements of a tensor: so many in a block of so many bytes."""

    name: str
    elements: int
    n_bytes: int


# Those that are read, and the names of others for messages, by ggml's numbers.
STORED = {
    0: StorageType("F32", 1, 4),
    1: StorageType("F16", 1, 2),
    8: StorageType("Q8_0", 32, 34),
    30: StorageType("BF16", 1, 2),
}
OTHERS = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"},
    **{13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16"},
    **{26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}


class StoredTensor(NamedTuple):
    """A tensor of a file: its shape in NumPy's order, its type, its place in bytes."""

    shape: tuple[int, ...]
    type: StorageType
    start: int
    size: int


class GgufFile:
    """The metadata by key, and the tensors by ggml's names, of one GGUF file.

    Numbers are Python's, floats of single precision the shortest decimals that round to them (so
    that 1e-5 is 1e-5 again); lists of strings are lists, other lists NumPy arrays. Raises
    InputError for a file that is missing, foreign, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a .gguf file")
        try:
            with path.open("rb") as file:
                self._read(_Header(path, file))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {COPY}") from None

    def _read(self, header: "_Header") -> None:
        _require_version(header)
        n_tensors, n_keys = header.number("<u8"), header.number("<u8")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = header.text()
            if key in self.metadata:
                raise InputError(f"{self.path}: {key} stands there twice; {COPY}")
            self.metadata[key] = header.value(key)
        found: dict[str, tuple[int, ...]] = {}
        places = []
        for _ in range(n_tensors):
            name, place = header.tensor()
            if name in found:
                raise InputError(f"{self.path}: the tensor {name} stands there twice; {COPY}")
            found[name] = place.shape
            places.append((name, place))
        self.tensors = self._located(places, header)

    def _located(
        self, places: list[tuple[str, StoredTensor]], header: "_Header"
    ) -> dict[str, StoredTensor]:
        """Return the tensors with their places in the file, in which all must lie, one by one."""
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment < 2**31 or alignment % 8:
            raise InputError(f"{self.path}: general.alignment {alignment!r} is none; {COPY}")
        data = -(-header.at // alignment) * alignment
        located = {name: t._replace(start=data + t.start) for name, t in places}
        end = 0
        for name, tensor in sorted(located.items(), key=lambda item: item[1].start):
            if tensor.start < end or tensor.start % alignment:
                raise InputError(f"{self.path}: {name} begins inside another tensor; {COPY}")
            end = tensor.start + tensor.size
            if end > header.size:
                raise InputError(
                    f"{self.path}: ends at {header.size:,} bytes, before {name} does (at {end:,}); "
                    f"it is truncated: {COPY}"
                )
        return located

    def get(self, key: str, wanted: type[T]) -> T | None:
        """Return the value of a key, None where the file lacks it.

        Raises InputError for a value of another type: llama.cpp does not convert any either.
        """
        value = self.metadata.get(key)
        if value is None or type(value) is wanted:
            return value
        raise self._mistyped(key, f"is {shown(value)}; {TYPES[wanted][0]} is needed")

    def get_list(self, key: str, wanted: type[T], length: int | None = None) -> list[T] | None:
        """Return the list of a key, None where the file lacks it.

        Raises InputError for no list, for one of another type and, with a length, for one of
        another length.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, np.ndarray):
            is_wanted = value.dtype.kind in TYPES[wanted][2]
        else:
            is_wanted = isinstance(value, list) and wanted is str
        if not is_wanted:
            raise self._mistyped(key, f"is {shown(value)}; a list of {TYPES[wanted][1]} is needed")
        if length is not None and len(value) != length:
            raise self._mistyped(key, f"has {len(value):,} entries; {length:,} are needed")
        found: list[T] = value if isinstance(value, list) else value.tolist()
        return found

    def _mistyped(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.path}: {key} {problem}; convert the model anew")

    def read(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8 [size]."""
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            found = np.fromfile(file, np.uint8, tensor.size, offset=tensor.start)
        if found.size != tensor.size:
            raise InputError(f"{self.path}: ends within {name}; it is truncated: {COPY}")
        return found


def shown(value: Any) -> str:
    """Return a value of the metadata as a message shows it."""
    if isinstance(value, list):
        return "a list of strings"
    if isinstance(value, np.ndarray):
        plural = next(many for _, many, kinds in TYPES.values() if value.dtype.kind in kinds)
        return f"a list of {plural}"
    return repr(value[:60] if isinstance(value, str) else value)


class _Header:
    """Reads values from the head of a file, none beyond its end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes; InputError where the file has no more so many."""
        content = self._file.read(count) if count <= self.size - self.at else b""
        if len(content) != count:
            raise InputError(f"{self.path}: ends within its header; it is truncated: {COPY}")
        self.at += count
        return content

    def number(self, kind: str) -> Any:
        """Return a number of one of NumPy's types."""
        dtype = np.dtype(kind)
        found = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        # NumPy writes the shortest decimal that rounds to a float of its precision.
        return float(str(found)) if dtype.kind == "f" else int(found)

    def text(self) -> str:
        """Return a string."""
        content = self.take(int.from_bytes(self.take(8), "little"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: a text of its header is no UTF-8; {COPY}") from None

    def value(self, key: str) -> Any:
        """Return the value of a key: a number, a string or a list of either."""
        kind = self.number("<u4")
        if kind == LIST:
            return self._list(key)
        return self._scalar(key, kind)()

    def _scalar(self, key: str, kind: int) -> Callable[[], Any]:
        if kind == STRING:
            return self.text
        if kind not in SCALARS:
            raise InputError(f"{self.path}: {key} is of the unknown type {kind}; {COPY}")
        return lambda: bool(self.number("<u1")) if kind == BOOL else self.number(SCALARS[kind])

    def _list(self, key: str) -> Any:
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind != STRING:
            raise InputError(f"{self.path}: {key} is a list of the type {kind}, not read; {COPY}")
        if count > (self.size - self.at) // 8:  # each string has its length in front
            raise InputError(f"{self.path}: ends within {key}; it is truncated: {COPY}")
        return [self.text() for _ in range(count)]

    def tensor(self) -> tuple[str, StoredTensor]:
        """Return a tensor's name and its entry, whose start counts from the first tensor."""
        name, n_axes = self.text(), self.number("<u4")
        if not 0 < len(name.encode()) <= LONGEST_NAME or not 0 < n_axes <= MOST_AXES:
            raise InputError(
                f"{self.path}: the entry of the tensor {name[:64]!r} is damaged; {COPY}"
            )
        shape = tuple(struct.unpack(f"<{n_axes}Q", self.take(8 * n_axes)))[::-1]
        number, start = self.number("<u4"), self.number("<u8")
        if number not in STORED:
            said = OTHERS.get(number, f"the unknown type {number}")
            raise InputError(
                f"{self.path}: {name} is stored as {said}, which is not read: F32, F16, BF16 "
                "and Q8_0 are; convert the model to one of them"
            )
        kind = STORED[number]
        count = 1
        for length in shape:
            count *= length
        if not count or shape[-1] % kind.elements:
            raise InputError(
                f"{self.path}: {name} is {list(shape)}, no shape of {kind.name}; {COPY}"
            )
        return name, StoredTensor(shape, kind, start, count // kind.elements * kind.n_bytes)


def _require_version(header: _Header) -> None:
    """Read the magic and the version; InputError for another format and for other versions."""
    path = header.path
    if header.size < len(MAGIC) or header.take(len(MAGIC)) != MAGIC:
        require_no_pointer(path)
        raise InputError(f"{path}: is no GGUF file; give one, or a Hugging Face directory")
    version = header.number("<u4")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise InputError(f"{path}: is a big-endian GGUF file; convert the model to little-endian")
    raise InputError(f"{path}: is a GGUF file of version {version}; versions 2 and 3 are read")
