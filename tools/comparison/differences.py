"""Where two implementations part: every activation's inherited and fresh error.

Inherited: theirs against the oracle's own run. Fresh: theirs against what the oracle's operation
makes of *their* input to it, so that only the operation where a bug enters shows one. Both are
measured against float64, and bounded by what the oracle loses in the precision under test.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from reference_np.config import InputError
from reference_np.ops import Array

from .judging import KL, REORDERED, Judged, Row, bound, judge, judge_kl
from .problem import Problem
from .replay import Activations, Key, Replay, Weights, finite, n_terms, stream_before

TRIES = 4  # plain runs at most that the other side's is held to


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
        theirs = problem.theirs.read(stage)
        free = low_free = exact_free.run(stage)
        given = finite(theirs)
        forced = low_forced = exact_forced.run(stage, given) if problem.forces() else {}
        if problem.theirs.reorder(exact_forced.orders):
            theirs = problem.theirs.read(stage)
            given = finite(theirs)
        if problem.dtype != "float64":
            low_free = plain_free.run(stage)
            low_forced = plain_forced.run(stage, given) if problem.forces() else {}
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
        if problem.theirs.is_reordered(key):
            rows.append(Row(*key, REORDERED))
            continue
        if name == KL:
            rows.append(judge_kl(c, theirs, free, low, problem.dtype))
            continue
        found = [Judged(free[key], bound(free[key], [x[key] for x in low], problem.dtype))]
        if problem.recording.coverage[c] == "activations":
            exact = forced.exact[key]
            n = n_terms(problem.config, name.rpartition(".")[2])
            limit = bound(exact, [forced.low[key]], problem.dtype, n)
            found.append(Judged(exact, limit, forced.allowed.get(key)))
        rows.append(judge(key, theirs.get(key), found))
    return rows


def begin(problem: Problem, replays: Sequence[Replay]) -> None:
    """Let free runs start in the middle, from the other side's stream."""
    name = stream_before(problem.first)
    for c, call in enumerate(problem.calls):
        stream = problem.recording.trace.read(c, name)
        for replay in replays:
            usable = stream is not None and np.isfinite(stream).all()
            if not (usable and replay.begin(c, stream)):
                raise InputError(
                    f"--layers {problem.first}: {name} of the call {call.name!r} is missing, "
                    "misshapen or not finite on the other side; begin at a layer before it"
                )
