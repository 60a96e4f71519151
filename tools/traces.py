"""Trace files: the activations of some calls of a model, in safetensors. See docs/trace-format.md.

Axes: B batch, T tokens of the call, S cached + T.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16, which safetensors then hands to NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_torch.checkpoint import atomic_write
from reference_np.checkpoint import parse_json
from reference_np.config import InputError, LlamaConfig
from reference_np.naming import LAYER_AXES, activation_axes
from reference_np.ops import Array
from reference_np.tolerances import UNIT_ROUNDOFF

FORMAT, VERSION = "llama-trace", "1"
AXES = {"embed": "BTD", **LAYER_AXES, "norm": "BTD", "logits": "BTV"}
_DTYPES = {"float64": "F64", "float32": "F32", "int64": "I64", "bool": "BOOL"}
_FLOATS = ("F64", "F32", "F16", "BF16")


class Call(NamedTuple):
    """One forward call: what goes in, and the earlier call whose cache it continues."""

    name: str
    tokens: Array  # int64 [B, T]
    positions: Array | None = None  # int64 [B, T]
    mask: Array | None = None  # bool [B, T, S], True = may attend
    after: int | None = None


def cached(calls: Sequence[Call], index: int) -> int:
    """Return how many tokens are cached before call ``index``."""
    after = calls[index].after
    return 0 if after is None else cached(calls, after) + calls[after].tokens.shape[1]


class TraceWriter:
    """Writes tensors to a file as they come, in the memory of one: the header is filled in last.

    The safetensors package writes only what is in memory all at once; a 7B model's activations
    are not.
    """

    def __init__(self, path: Path, config: LlamaConfig, calls: Sequence[Call], dtype: str) -> None:
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "config": config.to_json(),
            "dtype": dtype,
            "axes": json.dumps(AXES),
            "calls": json.dumps([{"name": call.name, "after": call.after} for call in calls]),
            "producer": "llama-parity",
        }
        self._header: dict[str, Any] = {"__metadata__": metadata}
        longest = {"dtype": "BOOL", "shape": [2**40] * 4, "data_offsets": [2**60] * 2}
        names = [f"call.{c}.{name}" for c in range(len(calls)) for name in _names(config)]
        # Rounded up, so that the data begin at a multiple of 8.
        self._room = -(-len(json.dumps(self._header | dict.fromkeys(names, longest))) // 8) * 8
        self._end = 0
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", self._room) + b" " * self._room)
        for c, call in enumerate(calls):
            for name in ("tokens", "positions", "mask"):
                value = getattr(call, name)
                if value is not None:
                    self.add(c, name, value if name == "mask" else value.astype(np.int64))

    def add(self, call: int, name: str, value: Array) -> None:
        """Write one tensor of a call."""
        value = np.ascontiguousarray(value)
        self._file.write(value.tobytes())
        self._header[f"call.{call}.{name}"] = {
            "dtype": _DTYPES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [self._end, self._end + value.nbytes],
        }
        self._end += value.nbytes

    def close(self) -> None:
        """Write the header."""
        self._file.seek(8)
        self._file.write(json.dumps(self._header).encode().ljust(self._room))
        self._file.close()


def write_trace(
    path: Path,
    config: LlamaConfig,
    calls: Sequence[Call],
    dtype: str,
    fill: Callable[[TraceWriter], None],
) -> None:
    """Let ``fill`` write a trace's activations; the file appears complete, or not at all."""

    def write(temporary: Path) -> None:
        writer = TraceWriter(temporary, config, calls, dtype)
        try:
            fill(writer)
        finally:
            writer.close()

    atomic_write(path, write)


class Trace:
    """A trace file, read one tensor at a time.

    Raises InputError for a file that is no trace, of another version, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as file:
            metadata: dict[str, str] = file.metadata() or {}
            self._names = set(file.keys())
            self._dtypes = {name: file.get_slice(name).get_dtype() for name in self._names}
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            found = f"{metadata.get('format')} version {metadata.get('version')}"
            raise self._error(f"its metadata says {found}, not {FORMAT} version {VERSION}")
        if (axes := parse_json(metadata.get("axes", "{}"), f"{path} (axes)")) != AXES:
            wrong = sorted(k for k in AXES.keys() | axes if axes.get(k) != AXES.get(k))
            raise self._error(f"its axes are not the format's for {', '.join(wrong)}")
        self.dtype = metadata.get("dtype", "")
        if self.dtype not in UNIT_ROUNDOFF:
            raise self._error(f"dtype {self.dtype!r} is not one of {', '.join(UNIT_ROUNDOFF)}")
        source = f"{path} (metadata)"
        self.config = LlamaConfig.from_hf(parse_json(metadata.get("config", ""), source), source)
        self.calls = self._read_calls(metadata.get("calls", ""))
        known = {f"call.{c}.{n}" for c in range(len(self.calls)) for n in _names(self.config)}
        self.unknown = sorted(self._names - known)

    def offers(self, call: int, name: str) -> bool:
        """Return whether an activation is there."""
        return f"call.{call}.{name}" in self._names

    def read(self, call: int, name: str) -> Array | None:
        """Return one activation as it is stored, or None where it is missing."""
        full = f"call.{call}.{name}"
        if full not in self._names:
            return None
        if self._dtypes[full] not in _FLOATS:
            raise self._error(f"{full} is stored as {self._dtypes[full]}, not in floats")
        return self._tensor(full)

    def _read_calls(self, text: str) -> list[Call]:
        entries = parse_json(f'{{"calls": {text or "null"}}}', f"{self.path} (calls)")["calls"]
        calls: list[Call] = []
        if not isinstance(entries, list) or not entries:
            raise self._error("its metadata lists no calls")
        for c, entry in enumerate(entries):
            after = entry.get("after") if isinstance(entry, dict) else -1
            if not (after is None or (isinstance(after, int) and 0 <= after < c)):
                raise self._error(f"call {c} must continue null or an earlier call, not {after!r}")
            given = {
                name: self._tensor(f"call.{c}.{name}")
                for name in ("tokens", "positions", "mask")
                if f"call.{c}.{name}" in self._names
            }
            if "tokens" not in given:
                raise self._error(f"call.{c}.tokens is missing")
            for name, value in given.items():
                given[name] = value.astype(bool if name == "mask" else np.int64)
            calls.append(Call(str(entry.get("name", f"call {c}")), after=after, **given))
        return calls

    def _tensor(self, name: str) -> Array:
        with self._open() as file:
            tensor: Array = file.get_tensor(name)
        return tensor

    @contextmanager
    def _open(self) -> Iterator[Any]:
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; give a trace in safetensors")
        try:
            with safe_open(self.path, framework="np") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise self._error(f"not a complete safetensors file ({error})") from None

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; write the trace again (docs/trace-format.md)")


def _names(config: LlamaConfig) -> Iterable[str]:
    return ("tokens", "positions", "mask", *activation_axes(config))
