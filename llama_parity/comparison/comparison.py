"""One comparison: model, calls, the oracle's parameters and the other side's activations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reference_np import ops as reference_ops
from reference_np.config import LlamaConfig
from reference_np.low_precision import rounded_ops
from reference_np.model import Ops
from reference_np.ops import Array

from .axes import Order, as_declared
from .judging import KL, Row
from .logprobs import at_targets, judged_targets
from .padding import Padding, find_padding
from .replay import EMBEDDING_STAGE, Key, RoundedParams, stage_input, stage_names
from .sides import LAST_LOGITS, Recording
from .trace_file import TraceFile
from .trace_format import LOGPROBS, Call


class TheirActivations:
    """Reads the other side's activations in float64, stage by stage.

    An activation that is found to be stored with its axes in another order than declared is
    returned in the declared order from then on.
    """

    def __init__(self, trace: TraceFile, config: LlamaConfig, calls: Sequence[Call]) -> None:
        self._trace, self._config, self._calls = trace, config, calls
        self._orders: dict[Key, Order] = {}

    def read(self, stage: int) -> dict[Key, Array]:
        """Return a stage's activations and the residual streams that it reads."""
        wanted = [*stage_names(self._config, stage), stage_input(stage)]
        stored = {
            (c, name): self._trace.read(c, name) for c in range(len(self._calls)) for name in wanted
        }
        if stage == self._config.n_layers:
            stored |= self._logprobs()
        wide = {key: value.astype(np.float64) for key, value in stored.items() if value is not None}
        orders = {key: order for key, order in self._orders.items() if key in wide}
        return wide | {key: as_declared(wide[key], order) for key, order in orders.items()}

    def _logprobs(self) -> dict[Key, Array | None]:
        """Return the log-probabilities of the targets of the calls that have some."""
        found: dict[Key, Array | None] = {}
        for c, call in enumerate(self._calls):
            stored = self._trace.read(c, LOGPROBS) if call.targets is not None else None
            if stored is not None and call.targets is not None:
                found[c, LOGPROBS] = at_targets(stored.astype(np.float64), call.targets)
        return found

    def reorder(self, orders: Mapping[Key, Order]) -> bool:
        """Add orders of axes by activation; return whether any is new."""
        new = orders.keys() - self._orders.keys()
        self._orders.update(orders)
        return bool(new)

    def is_reordered(self, key: Key) -> bool:
        """Return whether an activation is stored with its axes in another order."""
        return key in self._orders


class Comparison(NamedTuple):
    """A config, calls, the oracle's parameters in two precisions, the other side's activations."""

    config: LlamaConfig  # with as many layers as the other side ran
    calls: Sequence[Call]  # with targets where their log-probabilities are compared
    exact_params: RoundedParams  # the values of the precision under test, in float64
    baseline_params: RoundedParams  # the same values in the dtype of the baseline
    recording: Recording
    theirs: TheirActivations
    first_layer: int  # of those that are compared
    # By call: the tokens that are not judged. Besides padding, of an engine all but the last.
    padding: Padding

    @property
    def precision(self) -> str:
        """The precision under test."""
        return self.baseline_params.precision

    @property
    def baseline_ops(self) -> Ops:
        """The operations of the baseline, the oracle in the precision under test."""
        half = self.precision in ("bfloat16", "float16")
        return rounded_ops(self.precision) if half else reference_ops

    def stages(self) -> Sequence[int]:
        """Return the stages compared; a range of layers has no head unless it ends there."""
        whole = self.config.n_layers == self.exact_params.checkpoint.config.n_layers
        first = EMBEDDING_STAGE if self.first_layer == 0 else self.first_layer
        return range(first, self.config.n_layers + whole)

    def stage_of(self, row: Row) -> int:
        """Return the stage of a row's activation."""
        if row.name == "embed":
            return EMBEDDING_STAGE
        return self.config.n_layers if row.layer is None else row.layer

    def expected(self) -> list[Key]:
        """Return all activations to compare, in the order of computation."""
        return [key for stage in self.stages() for key in self.keys(stage)]

    def keys(self, stage: int) -> list[Key]:
        """Return a stage's activations to compare: the logits alone of calls that show no more."""
        return [
            (c, name)
            for c, covers in enumerate(self.recording.coverage)
            for name in self.names(stage)
            if self._is_compared(c, name, covers)
        ]

    def _is_compared(self, c: int, name: str, covers: str) -> bool:
        """Return whether an activation of a call is expected, which ``covers`` tells but for one.

        The log-probabilities of targets are compared wherever the other side has them.
        """
        if name == LOGPROBS:
            return self.calls[c].targets is not None
        alone = covers in ("logits", LAST_LOGITS)
        return covers == "activations" or (alone and name in ("logits", KL))

    def names(self, stage: int) -> list[str]:
        """Return the names of a stage's activations to compare, in any call."""
        names = stage_names(self.config, stage)
        # In float64 the bound of the logits is far tighter than a KL can resolve.
        kl = [KL] if self.precision != "float64" else []
        return [*names, *kl, LOGPROBS] if stage == self.config.n_layers else names

    def shows_logits(self) -> bool:
        """Return whether the other side shows logits in any call."""
        return not {"activations", "logits", LAST_LOGITS}.isdisjoint(self.recording.coverage)

    def has_activations(self) -> bool:
        """Return whether the other side shows more than logits in any call."""
        return "activations" in self.recording.coverage


def without_earlier_tokens(
    padding: Padding, calls: Sequence[Call], coverage: Sequence[str]
) -> Padding:
    """Return the tokens that are not judged: all but the last of calls of ``LAST_LOGITS``, too."""
    found = list(padding)
    for c, covers in enumerate(coverage):
        if covers == LAST_LOGITS:
            length = calls[c].tokens.shape[1]
            found[c] = np.broadcast_to(np.arange(length) < length - 1, calls[c].tokens.shape)
    return found


def make_comparison(
    path: Path,
    config: LlamaConfig,
    calls: Sequence[Call],
    precision: str,
    recording: Recording,
    first_layer: int,
) -> Comparison:
    """Open the checkpoint's parameters in both precisions, and the recorded activations."""
    exact = RoundedParams(path, precision, "float64")
    baseline = exact if precision == "float64" else RoundedParams(path, precision, "float32")
    padding = without_earlier_tokens(find_padding(calls), calls, recording.coverage)
    calls = judged_targets(calls, padding, recording.trace)
    theirs = TheirActivations(recording.trace, config, calls)
    return Comparison(config, calls, exact, baseline, recording, theirs, first_layer, padding)
