"""Estimate the least memory that a run takes, and refuse one that this machine cannot hold.

The estimate is a lower bound: it counts the tensors that any run of these sizes has at one time,
and none of what the libraries, the kernels' buffers and most activations take beside them. So a run
that is refused could not have worked; one that is not may still be too large.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama_common.errors import InputError, flag_of
from llama_common.memory import gib

from ..config import RunConfig
from ..finetuning_config import RewardConfig
from ..model.shapes import block_shapes, outer_shapes

BLOCK_OBJECTS = 20_000  # bytes of Python objects for each block, at least: modules and parameters


class Need(NamedTuple):
    """Bytes that a run takes at least, and the config's fields that they follow from."""

    n_bytes: int
    kind: str
    fields: tuple[str, ...]


class Layout(NamedTuple):
    """How the processes of a run share it."""

    fsdp: int = 1  # processes that share weights, gradients and moments
    tp: int = 1  # processes that share the matrices, and the positions between blocks
    data_size: int = 1  # processes, or groups of --tp, that share out the windows
    local: int = 1  # processes on one machine

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.fsdp * self.tp > 1


def require_run_memory(
    config: RunConfig, layout: Layout, host_memory: int, gpu_memory: int | None
) -> None:
    """Raise InputError where a run surely takes more bytes than the host or the GPU has.

    ``config.dtype`` is resolved. ``gpu_memory`` is that of the GPU that a process trains on; None:
    it trains on the CPU.
    """
    blocks = Need(config.model.n_layers * BLOCK_OBJECTS, "Python objects of blocks", ("n_layers",))
    step, windows = step_needs(config, layout), _windows(config, layout)
    if gpu_memory is None:
        host = [[*step, windows, blocks]]
    else:
        _require(config, step, 1, "the GPU", gpu_memory)
        # The whole model is initialised on the host, before the windows are read.
        initial = [] if layout.is_sharded else _state(config, layout, 4, "initial weights")
        host = [[*initial, blocks], [windows, blocks]]
    for needs in host:
        _require(config, needs, layout.local, "this machine", host_memory)


def require_batch_memory(config: RunConfig, memory: int) -> None:
    """Raise InputError where one batch of a single process takes more bytes than ``memory``."""
    needs = [_activations(config, config.batch_size), _windows(config, Layout())]
    _require(config, needs, 1, "this machine", memory)


def step_needs(config: RunConfig, layout: Layout) -> list[Need]:
    """Return the memory of one process's training step, without its windows of token ids.

    It is the weights and the larger of two amounts: gradients and moments, which are there at once
    at the end of a step, or a micro-batch's activations, which are there before its backward pass.
    """
    n_windows = _windows_of_process(config, layout)
    # bfloat16 weights have their lower bits beside them: 4 bytes in either precision.
    weights = _state(config, layout, 4, "weights")
    moved = gradient_and_moment_bytes(config, layout)
    others = _state(config, layout, moved, "gradients and moments")
    activations = [_activations(config, min(config.batch_size, n_windows), layout.tp)]
    return weights + max(others, activations, key=_total)


def gradient_and_moment_bytes(config: RunConfig, layout: Layout) -> int:
    """Return the bytes that a parameter's gradient and its two moments take together."""
    has_masters = config.dtype == "bfloat16" and not layout.is_sharded
    sums_in_float32 = not has_masters or _windows_of_process(config, layout) > config.batch_size
    gradient = 4 if sums_in_float32 else 2
    return gradient + (4 if config.optim.moments == "bfloat16" else 8)


def _state(run: RunConfig, layout: Layout, width: int, kind: str) -> list[Need]:
    """Return the memory of ``width`` bytes for each parameter that a process holds, by part."""
    config = run.model

    def elements_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        return {
            name: math.prod(shape) // (layout.fsdp * (layout.tp if len(shape) > 1 else 1))
            for name, shape in shapes.items()
        }

    elements = elements_of(block_shapes(config))
    feed_forward = sum(n for name, n in elements.items() if "mlp" in name)
    attention = sum(elements.values()) - feed_forward
    around = sum(elements_of(outer_shapes(config, isinstance(run, RewardConfig))).values())
    return [
        Need(width * around, kind, ("dim", "vocab_size")),
        Need(width * attention * config.n_layers, kind, ("dim", "n_heads", "head_dim", "n_layers")),
        Need(width * feed_forward * config.n_layers, kind, ("dim", "hidden_dim", "n_layers")),
    ]


def _activations(config: RunConfig, rows: int, tp: int = 1) -> Need:
    """Return the memory of a micro-batch's residual stream before each block and after the last.

    ``tp`` processes share its positions. Whatever else is computed again in the backward pass is
    computed from these.
    """
    model, width = config.model, 2 if config.dtype == "bfloat16" else 4
    n = (model.n_layers + 1) * rows * (_least_length(config) // tp) * model.dim
    return Need(width * n, "activations", ("batch_size", "max_seq_len", "dim", "n_layers"))


def _windows(config: RunConfig, layout: Layout) -> Need:
    """Return the memory of a step's windows of token ids, int64 [R, T + 1]."""
    n = 8 * _windows_of_process(config, layout) * (_least_length(config) + 1)
    return Need(n, "token ids of a step", ("batch_size", "grad_accum", "max_seq_len"))


def _least_length(config: RunConfig) -> int:
    """Return how many tokens a row of a micro-batch surely has.

    Where rows are as long as their conversations, which are not read yet, that is one.
    """
    return config.model.max_seq_len if config.fills_context else 1


def _windows_of_process(config: RunConfig, layout: Layout) -> int:
    return config.batch_size * config.grad_accum // layout.data_size


def _total(needs: Sequence[Need]) -> int:
    return sum(need.n_bytes for need in needs)


def _require(
    config: RunConfig, needs: Sequence[Need], processes: int, whose: str, there: int
) -> None:
    total = processes * _total(needs)
    if total <= there:
        return
    largest = max(needs, key=lambda need: need.n_bytes)
    settings = vars(config.model) | vars(config)
    flags = [f"{flag_of(name)} {settings[name]}" for name in largest.fields]
    for_all = f" for {processes} processes" if processes > 1 else ""
    raise InputError(
        f"{', '.join(flags)}: this run takes at least {gib(total)} of memory{for_all}, most of it "
        f"for {largest.kind}, and {whose} has {gib(there)}; choose smaller ones"
    )
