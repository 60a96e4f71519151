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
from reference_np.low_precision import plain_ops
from reference_np.model import Ops
from reference_np.ops import Array
from reference_np.tolerances import (
    LOGIC,
    Errors,
    composed_bound,
    errors,
    errors_beside,
    kl_bound,
    kl_per_token,
)

from .axes import Order, as_declared
from .replay import Activations, Key, Replay, Weights, stage_names, stream_before
from .sides import Recording
from .trace_file import Call

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
REORDERED = "in another order"
TRIES = 4  # plain runs at most that the other side's is held to


class Measure(NamedTuple):
    """An error and its bound."""

    error: Errors
    bound: Errors
    widest: Errors | None = None  # bound, where every element has its own

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.error.within(self.bound)

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        return self.error.share(self.bound)

    @property
    def loosest(self) -> Errors:
        """The bound wherever in the tensor the error is, for what is no error of one element."""
        return self.widest or self.bound


class Row(NamedTuple):
    """One activation of one call.

    status: ok; diverges (this operation is wrong); inherits (it is right and its input was
    not); or missing, not finite, misshapen, in another order of axes: not compared at all.
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
    orders: dict[Key, Order]  # of their axes, where found to be another than declared

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
        wide = {key: value.astype(np.float64) for key, value in found.items() if value is not None}
        orders = {key: order for key, order in self.orders.items() if key in wide}
        return wide | {key: as_declared(wide[key], order) for key, order in orders.items()}

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
    return Problem(config, calls, exact, low, recording, first, {})


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
    exact_forced = Replay(config, calls, problem.exact, watches=True)
    plain_free = Replay(config, calls, problem.low, problem.plain)
    plain_forced = Replay(config, calls, problem.low, problem.plain)
    tries = Tries(problem)
    if problem.first:
        begin(problem, (exact_free, plain_free))
    for stage in problem.stages():
        theirs = problem.theirs(stage)
        free = low_free = exact_free.run(stage)
        forced = low_forced = exact_forced.run(stage, theirs) if problem.forces() else {}
        if exact_forced.orders.keys() - problem.orders.keys():
            problem.orders.update(exact_forced.orders)
            theirs = problem.theirs(stage)
        if problem.dtype != "float64":
            low_free = plain_free.run(stage)
            low_forced = plain_forced.run(stage, theirs) if problem.forces() else {}
        allowed = {} if problem.dtype == "float64" else exact_forced.allowed
        fresh = Forced(forced, low_forced, allowed)
        rows = _rows(problem, stage, theirs, free, [low_free], fresh)
        if problem.dtype != "float64" and _inherits(rows):
            rows = _rows(problem, stage, theirs, free, [low_free, *tries.run(stage)], fresh)
        advance()
        yield Compared(rows, theirs, free, forced)


def _inherits(rows: Sequence[Row]) -> bool:
    return any(row.inherited is not None and not row.inherited.holds for row in rows)


class Forced(NamedTuple):
    """A stage on the other side's input, exact and plain, and what attention may err there."""

    exact: Activations
    low: Activations
    allowed: Activations


class Tries:
    """Plain runs of the model, each moved another way by what rounding may do.

    How far one rounding is carried (a score of 50 in an exponential carries it far) is a matter
    of luck, of which one plain run may have had more than the other side. They are run where it
    seems so.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.replays: list[Replay] = []

    def run(self, stage: int) -> list[dict[Key, Array]]:
        """Return the activations of a stage; what comes before it is run if it was not yet."""
        problem, low = self.problem, self.problem.low
        if not self.replays:
            for moved in range(1, TRIES):
                params = Weights(low.checkpoint.path, low.precision, low.dtype, moved)
                replay = Replay(problem.config, problem.calls, params, problem.plain)
                self.replays.append(replay)
            if problem.first:
                begin(problem, self.replays)
        found = []
        for replay in self.replays:
            for at in (s for s in problem.stages() if replay.stage < s <= stage):
                made = replay.run(at)
            found.append(made)
        return found


def _rows(
    problem: Problem,
    stage: int,
    theirs: Activations,
    free: Activations,
    low: Sequence[Activations],
    forced: Forced,
) -> list[Row]:
    """Judge all that must be there of a stage."""
    rows = []
    for c, name in problem.keys(stage):
        key = (c, name)
        if key in problem.orders:
            rows.append(Row(*key, REORDERED))
            continue
        if name == KL:
            rows.append(_kl_row(c, theirs, free, low, problem.dtype))
            continue
        found = [Judged(free[key], bound(free[key], [x[key] for x in low], problem.dtype))]
        if problem.recording.coverage[c] == "activations":
            exact = forced.exact[key]
            limit = bound(exact, [forced.low[key]], problem.dtype)
            found.append(Judged(exact, limit, forced.allowed.get(key)))
        rows.append(judge(key, theirs.get(key), found))
    return rows


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


class Judged(NamedTuple):
    """What an activation is held to: values, and the bound of all or of every element."""

    exact: Array
    bound: Errors
    allowed: Array | None = None

    def measure(self, theirs: Array) -> Measure:
        """Measure the other side's activation; of two bounds the nearer to hold counts.

        Where an input of attention is missing, the oracle's own stands in for it, and a plain
        run tells what that one's rounding makes of the output.
        """
        plain = Measure(errors(theirs, self.exact), self.bound)
        if self.allowed is None:
            return plain
        widest = errors(self.exact + self.allowed, self.exact)
        derived = Measure(*errors_beside(theirs, self.exact, self.allowed), widest)
        return min(derived, plain, key=lambda measure: measure.share)


def judge(key: Key, theirs: Array | None, held: Sequence[Judged]) -> Row:
    """Measure one activation against the free run and, if there is a second, the forced."""
    if theirs is None:
        return Row(*key, "missing")
    if theirs.shape != held[0].exact.shape:
        return Row(*key, "misshapen")
    if not np.isfinite(theirs).all():
        return Row(*key, "not finite")
    measures = [judged.measure(theirs) for judged in held]
    inherited, fresh = measures[0], measures[-1] if len(measures) > 1 else None
    status = "ok" if inherited.holds else "inherits"
    if not (fresh or inherited).holds:
        status = "diverges"
    return Row(*key, status, inherited, fresh)


def bound(exact: Array, low: Sequence[Array], dtype: str) -> Errors:
    """Return the error allowed to an implementation in ``dtype``; see composed_bound.

    Of several plain runs the one that errs most counts. One that overflowed excuses nothing.
    """
    if dtype == "float64":
        return Errors(LOGIC, LOGIC, LOGIC)
    tries = [error for error in (errors(x, exact) for x in low) if all(map(math.isfinite, error))]
    return composed_bound(Errors(*map(max, zip(Errors(0, 0, 0), *tries, strict=True))), dtype)


def _kl_row(
    c: int, theirs: Activations, free: Activations, low: Sequence[Activations], dtype: str
) -> Row:
    """Judge the KL of the worst token, in nats; it is inherited by nature."""
    key = (c, "logits")
    row = judge(key, theirs.get(key), [Judged(free[key], Errors(0, 0, 0))])._replace(name=KL)
    if row.inherited is None:
        return row
    kl, *honest = (float(kl_per_token(x[key], free[key]).max()) for x in (theirs, *low))
    finite = [x for x in honest if x < math.inf]  # NaN is not
    limit = kl_bound(max(finite, default=0.0), float(np.abs(free[key]).max()), dtype)
    measure = Measure(Errors(kl, kl, kl), Errors(limit, limit, limit))
    return row._replace(status="ok" if measure.holds else "inherits", inherited=measure)
