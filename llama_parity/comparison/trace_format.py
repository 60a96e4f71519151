"""Name the parts of a trace file, as docs/trace-format.md describes them.

Axes: B batch, T tokens of the call, S cached + T.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.naming import LAYER_AXES, activation_axes, parameter_shape, parameter_shapes
from reference_np.ops import Array

FORMAT, VERSION = "llama-trace", "2"
READABLE = ("1", VERSION)
AXES = {"embed": "BTD", **LAYER_AXES, "norm": "BTD", "logits": "BTV"}
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INTEGERS = {"I64": np.int64, "I32": np.int32}
MASKS = {"BOOL": np.uint8, "U8": np.uint8}  # bytes, to see those that are neither 0 nor 1
LONGEST_NAME = 80  # characters of a call's name that are kept

LOGPROBS = "target_logprobs"  # of each target after its position [B, T], natural logarithm
CALL_INPUTS = ("tokens", "positions", "mask", "targets")
BATCH_INPUTS = ("tokens", "targets", "positions", "mask")
STEP_SCALARS = ("loss", "grad_norm")
BEFORE_UPDATE, AFTER_UPDATE = ("grad",), ("param", "exp_avg", "exp_avg_sq")

_INDEX = r"0|[1-9]\d{0,8}"
_CALL = re.compile(rf"call\.({_INDEX})\.(?:layers\.({_INDEX})\.)?(\w+)", re.ASCII)
_STEP = re.compile(rf"step\.({_INDEX})\.(.*)", re.ASCII | re.DOTALL)
_BATCH = re.compile(rf"batch\.({_INDEX})\.({'|'.join(BATCH_INPUTS)})", re.ASCII)


class Call(NamedTuple):
    """One forward call: its inputs, and the index of the earlier call whose cache it continues."""

    name: str
    tokens: Array  # int64 [B, T]
    positions: Array | None = None  # int64 [B, T]
    mask: Array | None = None  # bool [B, T, S], True = may attend
    after: int | None = None
    targets: Array | None = None  # int64 [B, T]; IGNORE = no target


class Step(NamedTuple):
    """One training step of a trace: its micro-batches."""

    batches: Sequence[Batch]


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


def tensor_names(config: LlamaConfig, n_calls: int, steps: Sequence[Step]) -> Iterator[str]:
    """Yield the name of every tensor that a file of so many calls and steps can hold."""
    for c in range(n_calls):
        for name in (*CALL_INPUTS, *activation_axes(config), LOGPROBS):
            yield f"call.{c}.{name}"
    for s, step in enumerate(steps):
        for m in range(len(step.batches)):
            yield from (f"step.{s}.batch.{m}.{name}" for name in BATCH_INPUTS)
        yield from (f"step.{s}.{name}" for name in STEP_SCALARS)
        for kind in (*BEFORE_UPDATE, *AFTER_UPDATE):
            yield from (f"step.{s}.{kind}.{name}" for name in parameter_shapes(config))


def is_call_tensor(name: str, version: str, n_calls: int, config: LlamaConfig) -> bool:
    """Return whether a tensor is an input or an activation of one of the calls."""
    call = _CALL.fullmatch(name)
    if call is None or int(call[1]) >= n_calls:
        return False
    if call[2] is not None:
        return call[3] in LAYER_AXES and int(call[2]) < config.n_layers
    known = ("tokens", "positions", "mask", "embed", "norm", "logits")
    return call[3] in (known if version == "1" else (*known, "targets", LOGPROBS))


def unlisted_calls(names: Iterable[str], n_calls: int) -> list[int]:
    """Return the indices of calls after the last of ``n_calls`` that some tensors are named for."""
    found = (_CALL.fullmatch(name) for name in names)
    return sorted({index for call in found if call and (index := int(call[1])) >= n_calls})


def step_of(name: str) -> tuple[int, str] | None:
    """Return the step of a tensor ``step.{s}.{rest}`` and the rest; None for another name."""
    found = _STEP.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def batch_of(rest: str) -> tuple[int, str] | None:
    """Return the micro-batch and the input that a step's tensor is; None for another tensor."""
    found = _BATCH.fullmatch(rest)
    return (int(found[1]), found[2]) if found else None


def parameter_of(rest: str) -> tuple[str, str] | None:
    """Return the kind of a step's tensor of a parameter and the parameter; None for another."""
    kind, dot, parameter = rest.partition(".")
    return (kind, parameter) if dot and kind in (*BEFORE_UPDATE, *AFTER_UPDATE) else None


def step_shape(rest: str, config: LlamaConfig) -> tuple[int, ...] | None:
    """Return the shape of a result of a step; None where the model has no such parameter."""
    if rest in STEP_SCALARS:
        return ()
    _, _, parameter = rest.partition(".")
    return parameter_shape(config, parameter)


def call_inputs(call: Call) -> Mapping[str, Any]:
    """Return a call's input tensors by their names, those that it has."""
    given = {name: getattr(call, name) for name in CALL_INPUTS}
    return {name: value for name, value in given.items() if value is not None}


def batch_inputs(batch: Batch) -> Mapping[str, Any]:
    """Return a micro-batch's input tensors by their names, those that it has."""
    given = {name: getattr(batch, name) for name in BATCH_INPUTS}
    return {name: value for name, value in given.items() if value is not None}
