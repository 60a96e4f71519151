"""All that a comparison is about: the model, the calls, both sides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reference_np import ops as reference_ops
from reference_np.config import LlamaConfig
from reference_np.low_precision import plain_ops
from reference_np.model import Ops
from reference_np.ops import Array

from .axes import Order, as_declared
from .judging import KL, Row
from .replay import Key, Weights, stage_names, stream_before
from .sides import Recording
from .trace_file import Call, Trace


class Theirs:
    """The other side's activations in float64, read stage by stage.

    Where one is found to be stored with its axes in another order than declared, that is kept
    here, and what is read from then on is in the declared order.
    """

    def __init__(self, trace: Trace, config: LlamaConfig, n_calls: int) -> None:
        self._trace, self._config, self._n_calls = trace, config, n_calls
        self._orders: dict[Key, Order] = {}

    def read(self, stage: int) -> dict[Key, Array]:
        """Read the activations of a stage, and the streams that enter it."""
        wanted = [*stage_names(self._config, stage), stream_before(stage)]
        found = {
            (c, name): self._trace.read(c, name) for c in range(self._n_calls) for name in wanted
        }
        wide = {key: value.astype(np.float64) for key, value in found.items() if value is not None}
        orders = {key: order for key, order in self._orders.items() if key in wide}
        return wide | {key: as_declared(wide[key], order) for key, order in orders.items()}

    def reorder(self, orders: Mapping[Key, Order]) -> bool:
        """Take in the orders of axes that were found; return whether any is new."""
        new = orders.keys() - self._orders.keys()
        self._orders.update(orders)
        return bool(new)

    def is_reordered(self, key: Key) -> bool:
        """Return whether an activation was found to be in another order."""
        return key in self._orders


class Problem(NamedTuple):
    """Everything that is compared: a config, calls, two precisions of the weights, theirs."""

    config: LlamaConfig  # with as many layers as the other side ran
    calls: Sequence[Call]
    exact: Weights
    low: Weights  # the same in the dtype of the baseline
    recording: Recording
    theirs: Theirs
    first: int  # the first layer compared

    @property
    def dtype(self) -> str:
        """The precision under test."""
        return self.low.precision

    @property
    def plain(self) -> Ops:
        """The baseline's operations."""
        half = self.dtype in ("bfloat16", "float16")
        return plain_ops(self.dtype) if half else reference_ops

    def stages(self) -> Sequence[int]:
        """Return the stages compared; a range of layers has no head unless it ends there."""
        whole = self.config.n_layers == self.exact.checkpoint.config.n_layers
        first = -1 if self.first == 0 else self.first
        return range(first, self.config.n_layers + whole)

    def stage(self, row: Row) -> int:
        """Return the stage that a row belongs to."""
        if row.name == "embed":
            return -1
        return self.config.n_layers if row.layer is None else row.layer

    def expected(self) -> list[Key]:
        """Name all that must be there, in the order of computation."""
        return [key for stage in self.stages() for key in self.keys(stage)]

    def keys(self, stage: int) -> list[Key]:
        """Name what a stage is judged by: of calls that show their logits alone, those."""
        return [
            (c, name)
            for c, covers in enumerate(self.recording.coverage)
            for name in self.names(stage)
            if covers == "activations" or (covers == "logits" and name in ("logits", KL))
        ]

    def names(self, stage: int) -> list[str]:
        """Name what a stage is judged by."""
        names = stage_names(self.config, stage)
        # In float64 the logits' own bound is far below what a KL can tell.
        kl = stage == self.config.n_layers and self.dtype != "float64"
        return [*names, KL] if kl else names

    def forces(self) -> bool:
        """Return whether the other side shows more than logits."""
        return "activations" in self.recording.coverage


def make_problem(
    path: Path,
    config: LlamaConfig,
    calls: Sequence[Call],
    dtype: str,
    recording: Recording,
    first: int,
) -> Problem:
    """Open the weights in both precisions."""
    exact = Weights(path, dtype, "float64")
    low = exact if dtype == "float64" else Weights(path, dtype, "float32")
    theirs = Theirs(recording.trace, config, len(calls))
    return Problem(config, calls, exact, low, recording, theirs, first)
