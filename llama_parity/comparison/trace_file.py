"""Read and write trace files: activations of some calls of a model; see docs/trace-format.md.

Axes: B batch, T tokens of the call, S cached + T.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_common.errors import printable
from llama_common.files import atomic_write
from reference_np.config import InputError, LlamaConfig
from reference_np.model import check_inputs
from reference_np.naming import LAYER_AXES, activation_axes
from reference_np.ops import Array
from reference_np.tolerances import UNIT_ROUNDOFF
from reference_np.weight_files import parse_json

from .sizes import require_attention_memory

FORMAT, VERSION = "llama-trace", "1"
AXES = {"embed": "BTD", **LAYER_AXES, "norm": "BTD", "logits": "BTV"}
_DTYPES = {"float64": "F64", "float32": "F32", "int64": "I64", "bool": "BOOL"}
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INTEGERS = {"I64": np.int64, "I32": np.int32}
MOST_AXES = 32  # a wrong shape is an activation that fails, but NumPy holds no array of 65 axes
MASKS = {"BOOL": np.uint8, "U8": np.uint8}  # bytes, to see those that are neither 0 nor 1
LONGEST_NAME = 80  # characters of a call's name that are kept
MOST_POSITION = 2**31 - 1


_TENSOR = re.compile(
    r"call\.(?P<call>0|[1-9]\d{0,8})\.(?:layers\.(?P<layer>0|[1-9]\d{0,8})\.)?(?P<kind>\w+)",
    re.ASCII,
)


class Call(NamedTuple):
    """One forward call: its inputs, and the index of the earlier call whose cache it continues."""

    name: str
    tokens: Array  # int64 [B, T]
    positions: Array | None = None  # int64 [B, T]
    mask: Array | None = None  # bool [B, T, S], True = may attend
    after: int | None = None


def call_chain(calls: Sequence[Call], index: int) -> list[int]:
    """Return the indices of a call and of all that it continues, first to last."""
    found: list[int] = []
    at: int | None = index
    while at is not None:
        found.append(at)
        at = calls[at].after
    return found[::-1]


def n_cached(calls: Sequence[Call], index: int) -> int:
    """Return how many tokens the cache holds before call ``index``."""
    return sum(calls[c].tokens.shape[1] for c in call_chain(calls, index)[:-1])


class TraceWriter:
    """Writes tensors to a file one by one; the header, for which room is left, comes last.

    The safetensors package takes all tensors at once, and a 7B model's activations do not fit in
    memory.
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
        names = [f"call.{c}.{name}" for c in range(len(calls)) for name in _tensor_names(config)]
        # Rounded up, so that the data begins at a multiple of 8.
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
        """Write one tensor of a call: an activation, or an input of the call."""
        value = np.ascontiguousarray(value)
        value.tofile(self._file)
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
    """Write a trace file atomically, with the activations that ``fill`` adds to the writer."""

    def write(temporary: Path) -> None:
        writer = TraceWriter(temporary, config, calls, dtype)
        try:
            fill(writer)
        finally:
            writer.close()

    atomic_write(path, write)


class TraceFile:
    """Reads a trace file, one tensor at a time.

    Raises InputError for a file that is no trace, is of another version, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        metadata = self._check()
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
        self.unknown = sorted(name for name in self._entries if not self._is_known(name))

    def read(self, call: int, name: str) -> Array | None:
        """Return one activation in the precision of the file, or None where it is missing."""
        return self._tensor(f"call.{call}.{name}", FLOATS)

    def _is_known(self, name: str) -> bool:
        """Return whether a tensor is an input or an activation of one of the calls."""
        call = _TENSOR.fullmatch(name)
        if call is None or int(call["call"]) >= len(self.calls):
            return False
        if call["layer"] is None:
            return call["kind"] in ("tokens", "positions", "mask", "embed", "norm", "logits")
        return call["kind"] in LAYER_AXES and int(call["layer"]) < self.config.n_layers

    def _check(self) -> dict[str, str]:
        """Return the metadata, checked by safetensors; keep every tensor's place in the file."""
        if not os.path.isfile(self.path):  # false for a name that no file can have
            raise InputError(f"{self.path}: no such file; give a trace in safetensors")
        try:
            with safe_open(self.path, framework="np") as file:
                metadata: dict[str, str] = file.metadata() or {}
            with self.path.open("rb") as raw:
                (length,) = struct.unpack("<Q", raw.read(8))
                self._entries: dict[str, Any] = json.loads(raw.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise self._error(f"not a complete safetensors file ({error})") from None
        self._entries.pop("__metadata__", None)
        self._start = 8 + length
        return metadata

    def _read_calls(self, text: str) -> list[Call]:
        """Return the calls that the metadata lists in ``text``, with their input tensors."""
        entries = parse_json(f'{{"calls": {text or "null"}}}', f"{self.path} (calls)")["calls"]
        calls: list[Call] = []
        lengths: list[int] = []  # tokens in the cache after each call
        if not isinstance(entries, list) or not entries:
            raise self._error("its metadata lists no calls")
        for c, entry in enumerate(entries):
            after = entry.get("after", -1) if isinstance(entry, dict) else -1
            if not (after is None or (type(after) is int and 0 <= after < c)):
                raise self._error(f"call {c} must continue null or an earlier call, not {after!r}")
            tokens, positions = (
                self._tensor(f"call.{c}.{name}", INTEGERS) for name in ("tokens", "positions")
            )
            mask = self._tensor(f"call.{c}.mask", MASKS)
            if tokens is None:
                raise self._error(f"call.{c}.tokens is missing")
            self._check_values(c, positions, mask)
            calls.append(
                Call(
                    printable(str(entry.get("name", f"call {c}")), LONGEST_NAME),
                    tokens.astype(np.int64),
                    None if positions is None else positions.astype(np.int64),
                    None if mask is None else mask.astype(bool),
                    after,
                )
            )
            try:
                cached = 0 if after is None else lengths[after]
                check_inputs(*calls[c][1:4], cached, self.config)
            except InputError as error:
                raise self._error(f"call {c}: {error}") from None
            lengths.append(cached + tokens.shape[1])
            place = f"{self.path}: call {c}"
            require_attention_memory(place, tokens.shape, lengths[c], self.config)
            if after is not None and len(tokens) != len(calls[after].tokens):
                raise self._error(f"call {c} continues a call of another batch size")
        return calls

    def _check_values(self, call: int, positions: Array | None, mask: Array | None) -> None:
        """Raise InputError for positions that are none, and for a mask that is not 0 and 1."""
        if positions is not None:
            wrong = positions[(positions < 0) | (positions > MOST_POSITION)]
            if wrong.size:
                raise self._error(
                    f"call.{call}.positions holds {wrong[0]}, not 0 to {MOST_POSITION} alone"
                )
        if mask is not None and (mask > 1).any():
            raise self._error(f"call.{call}.mask holds {mask.max()}, not 0 and 1 alone")

    def _tensor(self, name: str, dtypes: Mapping[str, Any]) -> Array | None:
        """Return a tensor stored in one of ``dtypes``, or None where it is missing."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry["dtype"] not in dtypes:
            allowed = ", ".join(dtypes)
            raise self._error(f"{name} is stored as {entry['dtype']}, not as {allowed}")
        if len(entry["shape"]) > MOST_AXES:
            raise self._error(f"{name} has {len(entry['shape'])} axes, at most {MOST_AXES}")
        start, end = entry["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self._start + start)
            data = np.frombuffer(file.read(end - start), dtypes[entry["dtype"]])
        return data.reshape(entry["shape"])

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}; write the trace again (docs/trace-format.md)")


def _tensor_names(config: LlamaConfig) -> Iterable[str]:
    return ("tokens", "positions", "mask", *activation_axes(config))
