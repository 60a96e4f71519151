"""Where two implementations part: every activation's inherited and fresh error.

Inherited: theirs against the oracle's own run. Fresh: theirs against what the oracle's operation
makes of *their* input to it, so that only the operation where a bug enters shows one. Both are
measured against float64, and bounded by what the oracle loses in the precision under test.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reference_np import ops as reference_ops
from reference_np.config import InputError, LlamaConfig
from reference_np.model import Ops
from reference_np.ops import Array
from reference_np.plain import plain_ops
from reference_np.tolerances import (
    LOGIC,
    Errors,
    composed_bound,
    errors,
    kl_bound,
    kl_per_token,
)

from .replay import Activations, Key, Replay, Weights, stage_names, stream_before
from .sides import Recording
from .traces import Call, cached

# What each activation is the result of, given the traced ones before it.
OPERATION = {
    "embed": "the embedding lookup",
    "attn_norm": "RMSNorm before attention",
    "q": "the query projection",
    "k": "the key projection",
    "v": "the value projection",
    "q_rope": "the rotation of the queries (RoPE)",
    "k_rope": "the rotation of the keys (RoPE)",
    "attn": "attention (cache, scores, mask, softmax, mix)",
    "attn_proj": "the output projection of attention",
    "attn_residual": "the residual addition after attention",
    "ffn_norm": "RMSNorm before the feed-forward network",
    "gate": "the gate projection",
    "up": "the up projection",
    "ffn": "SwiGLU",
    "ffn_proj": "the down projection",
    "residual": "the residual addition after the feed-forward network",
    "norm": "the final RMSNorm",
    "logits": "the vocabulary projection",
    "logits.kl": "the predicted distribution",
}
KL = "logits.kl"


class Measure(NamedTuple):
    """An error and its bound."""

    error: Errors
    bound: Errors

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.error.within(self.bound)

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        return self.error.share(self.bound)


class Row(NamedTuple):
    """One activation of one call.

    status: ok; diverges (this operation is wrong); inherits (it is right and its input was
    not); or missing, not finite, misshapen: not compared at all.
    """

    call: int
    name: str
    status: str
    inherited: Measure | None = None
    fresh: Measure | None = None

    @property
    def kind(self) -> str:
        """The last part of the name."""
        return KL if self.name == KL else self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The layer's index; None for what belongs to none."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def compared(self) -> bool:
        """Whether numbers were compared at all."""
        return self.status in ("ok", "diverges", "inherits")

    @property
    def wrong(self) -> bool:
        """Whether it is wrong by itself, or cannot be compared."""
        return self.status not in ("ok", "inherits")

    @property
    def own(self) -> Measure | None:
        """The measure that tells of this operation alone, as far as it is known."""
        return self.fresh if self.fresh is not None else self.inherited


class Problem(NamedTuple):
    """Everything that is compared: a config, calls, two precisions of the weights, theirs."""

    config: LlamaConfig  # with as many layers as the other side ran
    calls: Sequence[Call]
    exact: Weights
    low: Weights  # the same in the dtype of the baseline
    recording: Recording
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

    def theirs(self, stage: int) -> dict[Key, Array]:
        """Read their activations of a stage, and the streams that enter it."""
        wanted = [*stage_names(self.config, stage), stream_before(stage)]
        found = {
            (c, name): self.recording.trace.read(c, name)
            for c in range(len(self.calls))
            for name in wanted
        }
        return {key: value.astype(np.float64) for key, value in found.items() if value is not None}

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
    return Problem(config, calls, exact, low, recording, first)


class Compared(NamedTuple):
    """What a stage showed: its rows, and the arrays that a report may draw."""

    rows: list[Row]
    theirs: Activations
    free: Activations
    forced: Activations


def compare(problem: Problem, advance: Callable[[], None]) -> Iterator[Compared]:
    """Yield each stage's rows, in order; both sides are read one stage at a time."""
    config, calls = problem.config, problem.calls
    exact_free = Replay(config, calls, problem.exact)
    exact_forced = Replay(config, calls, problem.exact)
    plain_free = Replay(config, calls, problem.low, problem.plain)
    plain_forced = Replay(config, calls, problem.low, problem.plain)
    if problem.first:
        begin(problem, (exact_free, plain_free))
    for stage in problem.stages():
        theirs = problem.theirs(stage)
        free = low_free = exact_free.run(stage)
        forced = low_forced = exact_forced.run(stage, theirs) if problem.forces() else {}
        if problem.dtype != "float64":
            low_free = plain_free.run(stage)
            low_forced = plain_forced.run(stage, theirs) if problem.forces() else {}
        rows = []
        for c, name in problem.keys(stage):
            if name == KL:
                rows.append(_kl_row(c, theirs, free, low_free, problem.dtype))
                continue
            key = (c, name)
            # Any order of attention's sum is right, and all that follows inherits it.
            terms = cached(calls, c) + calls[c].tokens.shape[1]
            found = [bound(free[key], low_free[key], problem.dtype, terms)]
            if problem.recording.coverage[c] == "activations":
                terms = terms if name.endswith(".attn") else 1
                found.append(bound(forced[key], low_forced[key], problem.dtype, terms))
            rows.append(judge(key, theirs.get(key), (free, forced), found))
        advance()
        yield Compared(rows, theirs, free, forced)


def begin(problem: Problem, replays: Sequence[Replay]) -> None:
    """Let free runs start in the middle, from the other side's stream."""
    name = stream_before(problem.first)
    for c, call in enumerate(problem.calls):
        stream = problem.recording.trace.read(c, name)
        for replay in replays:
            if not replay.begin(c, stream):
                raise InputError(
                    f"--layers {problem.first}: {name} of the call {call.name!r} is missing, "
                    "misshapen or not finite on the other side; begin at a layer before it"
                )


def judge(
    key: Key, theirs: Array | None, exact: Sequence[Activations], bounds: Sequence[Errors]
) -> Row:
    """Measure one activation against the free run and, if there is a second bound, the forced."""
    if theirs is None:
        return Row(*key, "missing")
    if theirs.shape != exact[0][key].shape:
        return Row(*key, "misshapen")
    if not np.isfinite(theirs).all():
        return Row(*key, "not finite")
    pairs = zip(exact, bounds, strict=False)
    measures = [Measure(errors(theirs, values[key]), limit) for values, limit in pairs]
    inherited, fresh = measures[0], measures[-1] if len(measures) > 1 else None
    status = "ok" if inherited.holds else "inherits"
    if not (fresh or inherited).holds:
        status = "diverges"
    return Row(*key, status, inherited, fresh)


def bound(exact: Array, low: Array, dtype: str, terms: int = 1) -> Errors:
    """Return the error allowed to an implementation in ``dtype``; see composed_bound."""
    if dtype == "float64":
        return Errors(LOGIC, LOGIC, LOGIC)
    plain = errors(low, exact)
    # A baseline that overflowed excuses nothing.
    plain = plain if all(map(math.isfinite, plain)) else Errors(0, 0, 0)
    return composed_bound(plain, dtype, terms)


def _kl_row(c: int, theirs: Activations, free: Activations, low: Activations, dtype: str) -> Row:
    """Judge the KL of the worst token, in nats; it is inherited by nature."""
    key = (c, "logits")
    row = judge(key, theirs.get(key), [free], [Errors(0, 0, 0)])._replace(name=KL)
    if row.inherited is None:
        return row
    kl, honest = (float(kl_per_token(x[key], free[key]).max()) for x in (theirs, low))
    limit = kl_bound(honest, float(np.abs(free[key]).max()), dtype)
    measure = Measure(Errors(kl, kl, kl), Errors(limit, limit, limit))
    return row._replace(status="ok" if measure.holds else "inherits", inherited=measure)
