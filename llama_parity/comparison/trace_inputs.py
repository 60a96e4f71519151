"""Read the inputs of a trace file, calls and training steps, and refuse those that are wrong.

Axes: B batch, T tokens of the call, S cached + T.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_common.errors import printable, shown
from reference_np.config import InputError, LlamaConfig
from reference_np.grad import Batch
from reference_np.model import check_inputs
from reference_np.naming import EMBED, LM_HEAD
from reference_np.ops import IGNORE, Array
from reference_np.optim import Hyperparameters
from reference_np.weight_files import parse_json

from .sizes import require_attention_memory
from .tensor_file import TensorFile
from .trace_format import (
    AFTER_UPDATE,
    INTEGERS,
    LONGEST_NAME,
    MASKS,
    STEP_SCALARS,
    Call,
    Step,
    batch_of,
    parameter_of,
    step_of,
    step_shape,
)

MOST_POSITION = 2**31 - 1


def read_calls(file: TensorFile, config: LlamaConfig, version: str) -> list[Call]:
    """Return the calls that the metadata lists, with their input tensors.

    Raises InputError for a list that contradicts itself and for inputs outside their domains.
    """
    text = file.metadata.get("calls", "")
    entries = parse_json(f'{{"calls": {text or "null"}}}', f"{file.path} (calls)")["calls"]
    calls: list[Call] = []
    lengths: list[int] = []  # tokens in the cache after each call
    if not isinstance(entries, list):
        raise file.error("its metadata lists no calls")
    for c, entry in enumerate(entries):
        after = entry.get("after", -1) if isinstance(entry, dict) else -1
        if not (after is None or (type(after) is int and 0 <= after < c)):
            raise file.error(f"call {c} must continue null or an earlier call, not {after!r}")
        cached = 0 if after is None else lengths[after]
        inputs = _read_inputs(file, f"call.{c}", f"call {c}", cached, config)
        targets = None
        if version != "1":
            targets = _read_targets(file, f"call.{c}", inputs["tokens"], config)
        name = printable(str(entry.get("name", f"call {c}")), LONGEST_NAME)
        calls.append(Call(name, **inputs, after=after, targets=targets))
        batch, length = calls[c].tokens.shape
        lengths.append(cached + length)
        if after is not None and batch != len(calls[after].tokens):
            raise file.error(f"call {c} continues a call of another batch size")
    return calls


def read_steps(file: TensorFile, config: LlamaConfig) -> list[Step]:
    """Return the training steps, with their micro-batches; check the names of their results.

    Raises InputError for a step without micro-batches or without a target, for inputs outside
    their domains, and for a result of no parameter or of another shape than its parameter's.
    """
    batches: dict[int, set[int]] = {}
    for name in sorted(file.names):
        if (found := step_of(name)) is None:
            continue
        s, rest = found
        batches.setdefault(s, set())
        if batch := batch_of(rest):
            batches[s].add(batch[0])
        elif rest in STEP_SCALARS or parameter_of(rest):
            _check_result(file, name, rest, config)
    for s, given in enumerate(sorted(batches)):
        if s != given or not batches[s]:
            missing = f"step.{s}.batch.0.tokens is missing"
            raise file.error(f"{missing}: step {s} has no micro-batch to compute it from")
    return [_read_step(file, s, len(batches[s]), config) for s in range(len(batches))]


def read_hyperparameters(file: TensorFile, steps: Sequence[Step]) -> Hyperparameters | None:
    """Return the training run's hyperparameters, or None where the metadata has none.

    Raises InputError where they are unknown, incomplete, no finite numbers or outside their domain,
    and where they are missing beside results of an update.
    """
    text = file.metadata.get("hyperparameters")
    if text is None:
        updated = [n for n in sorted(file.names) if steps and _is_updated(n)]
        if updated:
            raise file.error(
                f"{updated[0]} is a result of the optimizer, and the metadata has no "
                "hyperparameters to compute it with"
            )
        return None
    given = parse_json(text, f"{file.path} (hyperparameters)")
    fields = {field.name: field.type for field in dataclasses.fields(Hyperparameters)}
    if unknown := sorted(given.keys() - fields):
        name = printable(unknown[0], LONGEST_NAME)
        raise file.error(f"its hyperparameters have an unknown {name}; known: {', '.join(fields)}")
    if missing := [name for name in fields if name not in given]:
        raise file.error(f"its hyperparameters lack {', '.join(missing)}")
    for name, kind in fields.items():
        value = given[name]
        if kind is int:
            fits, wanted = (
                type(value) is int and 0 <= value <= MOST_POSITION,
                "an integer from 0 on",
            )
        else:
            fits, wanted = type(value) in (int, float) and abs(value) < 1e300, "a finite number"
        if not fits:
            raise file.error(f"its hyperparameter {name} is {shown(value)}, not {wanted}")
    try:
        return Hyperparameters(**given)
    except InputError as outside:  # what a field must be
        raise file.error(f"its hyperparameter {outside}") from None


def _is_updated(name: str) -> bool:
    """Return whether a tensor is a result of a step's update."""
    found = step_of(name)
    parameter = parameter_of(found[1]) if found else None
    return parameter is not None and parameter[0] in AFTER_UPDATE


def _read_step(file: TensorFile, s: int, n: int, config: LlamaConfig) -> Step:
    """Return step ``s`` of ``n`` micro-batches."""
    batches = []
    for m in range(n):
        place = f"step.{s}.batch.{m}"
        inputs = _read_inputs(file, place, f"step {s}, micro-batch {m}", 0, config)
        targets = _read_targets(file, place, inputs["tokens"], config)
        if targets is None:
            raise file.error(f"{place}.targets is missing")
        batches.append(Batch(inputs["tokens"], targets, inputs["positions"], inputs["mask"]))
    if all((batch.targets == IGNORE).all() for batch in batches):
        raise file.error(f"step {s} has no target but {IGNORE}, which stands for none")
    return Step(batches)


def _check_result(file: TensorFile, name: str, rest: str, config: LlamaConfig) -> None:
    """Raise InputError for a step's result of no parameter, or of another shape."""
    shape, found = step_shape(rest, config), file.shape(name)
    if shape is None:
        parameter = rest.partition(".")[2]
        why = "the parameters' names are Hugging Face's"
        if parameter == LM_HEAD and config.tie_embeddings:
            why = f"it is tied, and {EMBED} has the sum of both"
        raise file.error(f"{printable(name, 200)}: the model has no such parameter ({why})")
    if found != shape and not (shape == () and found == (1,)):
        raise file.error(f"{name} must be {list(shape)}, got {list(found)}")


def _read_inputs(
    file: TensorFile, place: str, title: str, cached: int, config: LlamaConfig
) -> Mapping[str, Any]:
    """Return tokens, positions and mask of a call or a micro-batch, checked."""
    tokens, positions = (file.read(f"{place}.{name}", INTEGERS) for name in ("tokens", "positions"))
    mask = file.read(f"{place}.mask", MASKS)
    if tokens is None:
        raise file.error(f"{place}.tokens is missing")
    if positions is not None:
        wrong = positions[(positions < 0) | (positions > MOST_POSITION)]
        if wrong.size:
            raise file.error(f"{place}.positions holds {wrong[0]}, not 0 to {MOST_POSITION} alone")
    if mask is not None and (mask > 1).any():
        raise file.error(f"{place}.mask holds {mask.max()}, not 0 and 1 alone")
    inputs: dict[str, Any] = {
        "tokens": tokens.astype(np.int64),
        "positions": None if positions is None else positions.astype(np.int64),
        "mask": None if mask is None else mask.astype(bool),
    }
    try:
        check_inputs(inputs["tokens"], inputs["positions"], inputs["mask"], cached, config)
    except InputError as error:
        raise file.error(f"{title}: {error}") from None
    keys = cached + tokens.shape[1]
    require_attention_memory(f"{file.path}: {title}", tokens.shape, keys, config)
    return inputs


def _read_targets(file: TensorFile, place: str, tokens: Array, config: LlamaConfig) -> Array | None:
    """Return the targets [B, T], int64, or None where there are none."""
    targets = file.read(f"{place}.targets", INTEGERS)
    if targets is None:
        return None
    if targets.shape != tokens.shape:
        raise file.error(
            f"{place}.targets must be {list(tokens.shape)} as its tokens are, got "
            f"{list(targets.shape)}"
        )
    outside = targets[(targets != IGNORE) & ((targets < 0) | (targets >= config.vocab_size))]
    if outside.size:
        raise file.error(
            f"{place}.targets holds {outside[0]}, outside the vocabulary of {config.vocab_size} "
            f"({IGNORE} stands for no target)"
        )
    return targets.astype(np.int64)
