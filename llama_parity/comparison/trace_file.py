"""Read and write trace files: what some calls and training steps of a model computed.

The format is described in docs/trace-format.md. Axes: B batch, T tokens of the call, S cached + T.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_common.errors import is_digits, printable
from llama_common.files import atomic_write
from reference_np.config import InputError, LlamaConfig
from reference_np.ops import Array
from reference_np.optim import Hyperparameters
from reference_np.tolerances import UNIT_ROUNDOFF
from reference_np.weight_files import parse_json

from .tensor_file import TensorFile
from .trace_format import (
    AXES,
    FLOATS,
    FORMAT,
    READABLE,
    STEP_SCALARS,
    VERSION,
    Call,
    Step,
    batch_inputs,
    batch_of,
    call_inputs,
    is_call_tensor,
    parameter_of,
    step_of,
    tensor_names,
    unlisted_calls,
)
from .trace_inputs import read_calls, read_hyperparameters, read_steps

_DTYPES = {"float64": "F64", "float32": "F32", "int64": "I64", "bool": "BOOL"}


class TraceWriter:
    """Writes tensors to a file one by one; the header, for which room is left, comes last.

    The safetensors package takes all tensors at once, and a 7B model's activations do not fit in
    memory. The inputs of ``calls`` and ``steps`` are written at once, their results by ``add``
    and ``add_step``. ``hyperparameters`` are to be given where a step's update is written.
    """

    def __init__(
        self,
        path: Path,
        config: LlamaConfig,
        calls: Sequence[Call],
        dtype: str,
        steps: Sequence[Step] = (),
        hyperparameters: Hyperparameters | None = None,
    ) -> None:
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "config": config.to_json(),
            "dtype": dtype,
            "axes": json.dumps(AXES),
            "calls": json.dumps([{"name": call.name, "after": call.after} for call in calls]),
            "producer": "llama-parity",
        }
        if hyperparameters is not None:
            metadata["hyperparameters"] = json.dumps(dataclasses.asdict(hyperparameters))
        self._header: dict[str, Any] = {"__metadata__": metadata}
        longest = {"dtype": "BOOL", "shape": [2**40] * 4, "data_offsets": [2**60] * 2}
        names = tensor_names(config, len(calls), steps)
        # Rounded up, so that the data begins at a multiple of 8.
        self._room = -(-len(json.dumps(self._header | dict.fromkeys(names, longest))) // 8) * 8
        self._end = 0
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", self._room) + b" " * self._room)
        for c, call in enumerate(calls):
            for name, value in call_inputs(call).items():
                self.add(c, name, value if name == "mask" else value.astype(np.int64))
        for s, step in enumerate(steps):
            for m, batch in enumerate(step.batches):
                for name, value in batch_inputs(batch).items():
                    stored = value if name == "mask" else value.astype(np.int64)
                    self.add_step(s, f"batch.{m}.{name}", stored)

    def add(self, call: int, name: str, value: Array) -> None:
        """Write one tensor of a call: an activation, or ``target_logprobs`` [B, T]."""
        self._add(f"call.{call}.{name}", value)

    def add_step(self, step: int, name: str, value: Array) -> None:
        """Write one result of a training step.

        ``loss``, ``grad_norm`` or ``grad.{parameter}``; after the update ``param.{parameter}``,
        ``exp_avg.{parameter}`` or ``exp_avg_sq.{parameter}``.
        """
        self._add(f"step.{step}.{name}", value)

    def _add(self, name: str, value: Array) -> None:
        shape = np.shape(value)  # contiguous arrays have an axis at least
        value = np.ascontiguousarray(value)
        value.tofile(self._file)
        self._header[name] = {
            "dtype": _DTYPES[value.dtype.name],
            "shape": list(shape),
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
    *,
    steps: Sequence[Step] = (),
    hyperparameters: Hyperparameters | None = None,
) -> None:
    """Write a trace file atomically, with the results that ``fill`` adds to the writer."""

    def write(temporary: Path) -> None:
        writer = TraceWriter(temporary, config, calls, dtype, steps, hyperparameters)
        try:
            fill(writer)
        finally:
            writer.close()

    atomic_write(path, write)


class TraceFile:
    """Reads a trace file of version 1 or 2, one tensor at a time.

    Raises InputError for a file that is no trace, is of another version, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = TensorFile(path)
        self.path, metadata = self._file.path, self._file.metadata
        self.version = metadata.get("version", "")
        self._check_version()
        if (axes := parse_json(metadata.get("axes", "{}"), f"{path} (axes)")) != AXES:
            wrong = sorted(k for k in AXES.keys() | axes if axes.get(k) != AXES.get(k))
            raise self._file.error(f"its axes are not the format's for {', '.join(wrong)}")
        self.dtype = metadata.get("dtype", "")
        if self.dtype not in UNIT_ROUNDOFF:
            raise self._file.error(f"dtype {self.dtype!r} is not one of {', '.join(UNIT_ROUNDOFF)}")
        self.float32_angles = self._flag("float32_angles")
        source = f"{path} (metadata)"
        self.config = LlamaConfig.from_hf(parse_json(metadata.get("config", ""), source), source)
        self.calls = read_calls(self._file, self.config, self.version)
        self.steps: Sequence[Step] = []
        self.hyperparameters: Hyperparameters | None = None
        if self.version != "1":
            self.steps = read_steps(self._file, self.config)
            self.hyperparameters = read_hyperparameters(self._file, self.steps)
        if not self.calls and not self.steps:
            raise self._file.error("its metadata lists no calls")
        self.unknown = sorted(name for name in self._file.names if not self._is_known(name))
        self.unlisted_calls = unlisted_calls(self.unknown, len(self.calls))

    def read(self, call: int, name: str) -> Array | None:
        """Return one activation in the precision of the file, or None where it is missing."""
        return self._file.read(f"call.{call}.{name}", FLOATS)

    def has(self, call: int, name: str) -> bool:
        """Return whether the file holds a tensor of a call."""
        return f"call.{call}.{name}" in self._file.names

    def read_step(self, step: int, name: str) -> Array | None:
        """Return one result of a training step by its name after ``step.{s}.``, or None."""
        value = self._file.read(f"step.{step}.{name}", FLOATS)
        return value.reshape(()) if value is not None and name in STEP_SCALARS else value

    def has_step(self, step: int, name: str) -> bool:
        """Return whether the file holds a result of a training step."""
        return f"step.{step}.{name}" in self._file.names

    def _check_version(self) -> None:
        """Raise InputError for a file that is no trace, and for a version that is not read."""
        found = self._file.metadata.get("format")
        if found != FORMAT:
            raise self._file.error(f"its metadata says format {found}, not {FORMAT}")
        known = " or ".join(READABLE)
        if is_digits(self.version) and int(self.version[:9]) > int(VERSION):
            version = printable(self.version, 20)
            raise InputError(
                f"{self.path}: is a trace of version {version}, and this release reads versions "
                f"{' and '.join(READABLE)}; upgrade it (pip install -U llama-parity), or write "
                f"version {VERSION} (docs/trace-format.md)"
            )
        if self.version not in READABLE:
            raise self._file.error(f"its metadata says version {self.version!r}, not {known}")

    def _flag(self, key: str) -> bool:
        """Return a value of the metadata that is true or false, false where it has none."""
        text = self._file.metadata.get(key, "false")
        if text not in ("true", "false"):
            raise self._file.error(
                f"its metadata says {key} {printable(text, 20)}, not true or false"
            )
        return text == "true"

    def _is_known(self, name: str) -> bool:
        """Return whether a tensor is an input or a result of one of the calls or steps."""
        if is_call_tensor(name, self.version, len(self.calls), self.config):
            return True
        if not self.steps or (found := step_of(name)) is None:
            return False
        rest = found[1]
        return bool(batch_of(rest) or parameter_of(rest)) or rest in STEP_SCALARS
