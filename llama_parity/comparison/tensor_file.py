"""Read the tensors of one safetensors file, whatever its header promises, one at a time."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from reference_np.config import InputError
from reference_np.foreign import require_readable
from reference_np.ops import Array

MOST_AXES = 32  # a wrong shape is an activation that fails, but NumPy holds no array of 65 axes


class TensorFile:
    """A file's metadata, and its tensors in the precision in which they are stored.

    Raises InputError for a file that is not there or no complete safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):  # false for a name that no file can have
            raise InputError(f"{self.path}: no such file; give a trace in safetensors")
        require_readable(self.path)
        try:
            with safe_open(self.path, framework="np") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
            with self.path.open("rb") as raw:
                (length,) = struct.unpack("<Q", raw.read(8))
                self._entries: dict[str, Any] = json.loads(raw.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise self.error(f"not a complete safetensors file ({error})") from None
        self._entries.pop("__metadata__", None)
        self.names = frozenset(self._entries)
        self._start = 8 + length

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that the file holds."""
        return tuple(self._entries[name]["shape"])

    def read(self, name: str, dtypes: Mapping[str, Any]) -> Array | None:
        """Return a tensor stored in one of ``dtypes``, or None where it is missing."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry["dtype"] not in dtypes:
            allowed = ", ".join(dtypes)
            raise self.error(f"{name} is stored as {entry['dtype']}, not as {allowed}")
        if len(entry["shape"]) > MOST_AXES:
            raise self.error(f"{name} has {len(entry['shape'])} axes, at most {MOST_AXES}")
        start, end = entry["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self._start + start)
            data = np.frombuffer(file.read(end - start), dtypes[entry["dtype"]])
        return data.reshape(entry["shape"])

    def error(self, problem: str) -> InputError:
        """Return the error of a file with a problem, which says how to mend it."""
        return InputError(f"{self.path}: {problem}; write the trace again (docs/trace-format.md)")
