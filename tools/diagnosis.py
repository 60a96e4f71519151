"""Which known bug makes the oracle compute what the other side computed.

Every operation that went wrong is done again by the oracle with each known bug in it, on the
other side's own input, and so are pairs of bugs. Where the other side shows its logits alone,
the whole oracle is run again instead.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from reference_np import ops as reference_ops
from reference_np.model import Ops
from reference_np.mutants import FORWARD, Mutant
from reference_np.ops import Array
from reference_np.tolerances import errors

from .differences import KL, Problem, Row
from .replay import Key, Replay
from .traces import Call

# Two ways of rounding one thing err alike within this, typically: a port may round a sum that the
# catalogue's bug keeps. TF32 and bfloat16 differ by 8: of several, the closest is named.
SIZE_FACTOR = 10.0
# Rounding touches everything; a wrong weight or channel does not. This part of the elements must
# err by a tenth of the error's rms.
TOUCHED = 0.1
# Logits of a random head have about this correlation with the right ones, or less.
UNRELATED = 0.2

Bugs = tuple[Mutant, ...]
HOW = {
    "value": "equals the oracle with",
    "size": "errs as much as the oracle with",
    "nothing": "is as unrelated to the oracle's as with",
}


class Effect(NamedTuple):
    """What a suspect makes of one activation."""

    fits: bool  # theirs within the bound
    error: float  # theirs against it, relative rms
    # How unlike a bug that is known by its size or by nothing, 1 at the limit; else infinite.
    unlike: float
    moves: bool  # it changes this activation at all


Suspect = tuple[Bugs, Mapping[Key, Effect]]


class Finding(NamedTuple):
    """One bug, or several at once or indistinguishable here, and what it explains."""

    suspects: tuple[Bugs, ...]  # each alone explains it
    how: str  # a key of HOW
    row: Row  # the first one explained
    before: float
    after: float
    explains: int
    of: int


class Diagnosis(NamedTuple):
    """The findings, the rows that they leave unexplained, and the closest miss."""

    findings: list[Finding]
    unexplained: list[Row]
    looked_at: int


def with_bugs(bugs: Iterable[Mutant], ops: Ops = reference_ops) -> Ops:
    """Return the operations with every one of ``bugs`` in them."""
    namespace = SimpleNamespace(**vars(ops))
    for bug in bugs:
        namespace = bug.apply(namespace)
    return namespace


class Look:
    """Evaluates suspects on the rows of a few stages, or of the whole model; remembers them."""

    def __init__(self, problem: Problem, rows: Sequence[Row], advance: Callable[[], None]) -> None:
        self.problem, self.advance = problem, advance
        failing = [row for row in rows if row.status == "diverges" and row.name != KL]
        self.forced = any(row.fresh is not None for row in failing)
        stages = sorted({self.stage(row) for row in failing})
        self.stages = stages if not self.forced else sorted({*stages[:2], *stages[-1:]})
        self.rows = {
            (row.call, row.name): row
            for row in rows
            if row.own is not None and row.name != KL and self.stage(row) in self.stages
            if (row.fresh is not None) == self.forced
        }
        self.failing = {key for key, row in self.rows.items() if row.status == "diverges"}
        self.theirs = {}
        for stage in self.stages:
            self.theirs.update(problem.theirs(stage))
        self.honest = self.replay(())

    def stage(self, row: Row) -> int:
        """Return the stage of a row."""
        if row.name == "embed":
            return -1
        return self.problem.config.n_layers if row.layer is None else row.layer

    def replay(self, bugs: Bugs, only: int | None = None) -> dict[Key, Array]:
        """Run the oracle with some bugs on the stages looked at; return what it makes of them.

        ``only`` is a call: the others are left out where it does not depend on them.
        """
        problem = self.problem
        calls = list(range(len(problem.calls))) if only is None else chain(problem.calls, only)
        place = {call: index for index, call in enumerate(calls)}
        chosen = [
            call._replace(after=None if call.after is None else place[call.after])
            for call in (problem.calls[c] for c in calls)
        ]
        with np.errstate(all="ignore"):  # bugs may overflow
            oracle = Replay(problem.config, chosen, problem.low, with_bugs(bugs, problem.plain))
            found: dict[Key, Array] = {}
            for stage in self.stages if self.forced else problem.stages():
                theirs = None
                if self.forced:
                    theirs = {
                        (place[c], name): value
                        for (c, name), value in self.theirs.items()
                        if c in place
                    }
                for (index, name), value in oracle.run(stage, theirs).items():
                    if (calls[index], name) in self.rows:
                        found[calls[index], name] = value
        self.advance()
        return found

    def effects(self, bugs: Bugs, only: int | None = None) -> dict[Key, Effect]:
        """Compare what the bugs make of each activation with theirs."""
        found = self.replay(bugs, only)
        with np.errstate(all="ignore"):
            return {key: self._effect(key, value, bugs) for key, value in found.items()}

    def _effect(self, key: Key, value: Array, bugs: Bugs) -> Effect:
        row, theirs, honest = self.rows[key], self.theirs[key], self.honest[key]
        assert row.own is not None
        error = errors(theirs, value)
        unlike = math.inf
        wrong = np.abs(theirs - honest)
        everywhere = np.mean(wrong > 0.1 * np.sqrt(np.mean(wrong**2))) > TOUCHED
        alone = bugs[0].known_by if len(bugs) == 1 and row.status == "diverges" else "value"
        if alone == "size" and everywhere:
            sizes = errors(value, honest).rms, errors(theirs, honest).rms
            if min(sizes) > 0 and max(sizes) < math.inf:
                unlike = abs(math.log(sizes[0] / sizes[1])) / math.log(SIZE_FACTOR)
        elif alone == "nothing" and errors(value, honest).rms > row.own.bound.rms:
            unlike = abs(correlation(theirs, honest)) / UNRELATED
        moves = not np.array_equal(value, honest)
        return Effect(error.within(row.own.bound), error.rms, unlike, moves)


def chain(calls: Sequence[Call], call: int) -> list[int]:
    """Return a call and all that it continues, first to last."""
    after = calls[call].after
    return [call] if after is None else [*chain(calls, after), call]


def correlation(a: Array, b: Array) -> float:
    """Return the mean correlation over the last axis."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(np.mean((a * b).sum(-1) / np.where(size == 0, 1.0, size)))


def diagnose(
    problem: Problem, rows: Sequence[Row], advance: Callable[[], None] = lambda: None
) -> Diagnosis:
    """Explain the rows that diverge by as few known bugs as will do.

    Single bugs that give the very values first, then pairs of them, then those that are known
    by the size of their error alone.
    """
    if not any(row.status == "diverges" and row.name != KL for row in rows):
        return Diagnosis([], [], 0)
    look = Look(problem, rows, advance)
    single = [((bug,), look.effects((bug,))) for bug in FORWARD]
    left = set(look.failing)
    findings = cover(look.rows, single, left)
    if left:
        findings += cover(look.rows, _pairs(look, single, left), left)
    if left:
        findings += cover(look.rows, single, left, by_likeness=True)
    unexplained = [row for key, row in look.rows.items() if key in left]
    return Diagnosis(findings, unexplained, len(look.failing))


def cover(
    rows: Mapping[Key, Row],
    suspects: Sequence[Suspect],
    left: set[Key],
    by_likeness: bool = False,
) -> list[Finding]:
    """Take the suspects that explain most of ``left`` and contradict the fewest right rows.

    What is explained is taken out of ``left``.
    """
    findings: list[Finding] = []
    while left:
        scores = []
        for _, found in suspects:
            alike, unlike = _alike(found, left)
            explained = alike if by_likeness else {k for k in left if k in found and found[k].fits}
            layers = {rows[key].layer for key in explained}
            against = sum(
                not effect.fits
                for key, effect in found.items()
                if rows[key].status == "ok" and rows[key].layer in layers
            )
            score = (len(explained), -against, -unlike if by_likeness else 0.0)
            # A rounding that gives most values exactly explains the few that fell otherwise.
            scores.append((*score, explained | alike if explained else set()))
        best = max((score[:-1] for score in scores), default=(0,))
        if best[0] == 0:
            return findings
        explained = next(score[-1] for score in scores if score[:-1] == best)
        guilty = [
            suspect
            for suspect, score in zip(suspects, scores, strict=True)
            if score == (*best, explained)
        ]
        first = next(key for key in rows if key in explained)
        row = rows[first]
        assert row.own is not None
        (bug, *_), found = guilty[0]
        findings.append(
            Finding(
                tuple(bugs for bugs, _ in guilty),
                bug.known_by if by_likeness else "value",
                row,
                row.own.error.rms,
                found[first].error,
                len(explained),
                sum(row.status == "diverges" for row in rows.values()),
            )
        )
        left -= explained
    return findings


def _alike(found: Mapping[Key, Effect], left: set[Key]) -> tuple[set[Key], float]:
    """Return the rows that a bug known by its size (or by nothing) explains, and how unlike it.

    The median counts: a single tensor of few tokens scatters.
    """
    unlike = {k: found[k].unlike for k in left if k in found and found[k].unlike < math.inf}
    typical = float(np.median(list(unlike.values()))) if unlike else math.inf
    return (set(unlike), typical) if typical < 1 else (set(), math.inf)


def _pairs(look: Look, single: Sequence[Suspect], left: set[Key]) -> list[Suspect]:
    """Try two bugs at once, on the cheapest call that is unexplained; return those that fit there.

    Only bugs that change anything there are tried, and never two of one operation.
    """
    size = {
        c: sum(look.problem.calls[p].tokens.size for p in chain(look.problem.calls, c))
        for c in range(len(look.problem.calls))
    }
    target = min(left, key=lambda key: (size[key[0]], list(look.rows).index(key)))
    active = [bugs[0] for bugs, found in single if found[target].moves]
    fitting = [
        pair
        for pair in combinations(active, 2)
        if pair[0].operation != pair[1].operation
        and look.effects(pair, only=target[0])[target].fits
    ]
    return [(pair, look.effects(pair)) for pair in fitting]
