"""Which known bug makes the oracle compute what the other side computed.

Every operation that went wrong is done again by the oracle with each known bug in it, on the
other side's own input, and so are pairs of bugs. Where the other side shows its logits alone,
the whole oracle is run again instead.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference_np.model import Ops
from reference_np.mutants import FORWARD, Mutant
from reference_np.ops import Array
from reference_np.tolerances import Errors, errors

from .differences import KL, Problem, Row
from .replay import Key, Replay
from .trace_file import chain

# Two ways of rounding one thing err alike within this, typically: a port may round a sum that the
# catalogue's bug keeps. TF32 and bfloat16 differ by 8: of several, the closest is named.
SIZE_FACTOR = 10.0
# Rounding touches everything; a wrong weight or channel does not. This part of the elements must
# err by a tenth of the error's rms.
TOUCHED = 0.1
# Logits of a random head have about this correlation with the right ones, or less.
UNRELATED = 0.2
KEPT = 1 << 30  # bytes of the weights of the stages looked at
FIRST = 2  # stages on which every bug is tried, and the last one: what it explains, on all

Bugs = tuple[Mutant, ...]
Start = Callable[[str, int], Callable[[], None]]
HOW = {
    "value": "equals the oracle with",
    "size": "is reproduced by no known bug, but errs as much as, and only where, the oracle with",
    "nothing": "is as unrelated to the oracle's as with",
}


class Effect(NamedTuple):
    """What a suspect makes of one activation."""

    fits: bool  # theirs within the bound
    error: float  # theirs against it, relative rms
    # How unlike a bug that is known by its size or by nothing, 1 at the limit; else infinite.
    unlike: float
    moves: bool  # it changes this activation at all


# Of most bugs on most activations: no error is asked for where a suspect does not fit.
ELSEWHERE = Effect(fits=False, error=math.inf, unlike=math.inf, moves=True)

Suspect = tuple[Bugs, Mapping[Key, Effect]]


class Finding(NamedTuple):
    """One bug, or several at once or indistinguishable here, and what it explains."""

    suspects: tuple[Bugs, ...]  # each alone explains it
    how: str  # a key of HOW
    row: Row  # the first one explained
    before: float
    after: float
    explains: int
    against: int  # right activations that the bug would change


class Diagnosis(NamedTuple):
    """The findings, and the diverging rows that they leave unexplained."""

    findings: list[Finding]
    unexplained: list[Row]


class Watched(SimpleNamespace):
    """Operations that note which of them are looked up."""

    def __init__(self, ops: Ops, seen: set[str]) -> None:
        super().__init__(**vars(ops))
        self.__dict__[""] = seen  # a name that no operation has

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__"):
            vars(self)[""].add(name)
        return super().__getattribute__(name)


def with_bugs(bugs: Iterable[Mutant], ops: Ops) -> Ops:
    """Return the operations with every one of ``bugs`` in them."""
    namespace = SimpleNamespace(**vars(ops))
    for bug in bugs:
        namespace = bug.apply(namespace)
    return namespace


class Look:
    """Tries bugs on a few stages, or, where nothing but logits is shown, on the whole model."""

    def __init__(self, problem: Problem, rows: Sequence[Row], stages: Sequence[int]) -> None:
        self.problem, self.stages = problem, stages
        self.theirs: dict[Key, Array] = {}
        for stage in stages:
            self.theirs.update(problem.theirs(stage))
        found = [r for r in rows if r.name != KL and r.own and problem.stage(r) in stages]
        self.forced = any(row.fresh for row in found)
        self.rows = {(row.call, row.name): row for row in found if bool(row.fresh) == self.forced}
        # Every bug reads the same weights, and is forced by the same activations.
        self.low = problem.low.keeping(KEPT)
        self.forcing = {k: v for k, v in self.theirs.items() if np.isfinite(v).all()}
        self.honest: dict[Key, Array] = {}
        self.used: dict[int, set[str]] = {}  # the operations of each stage
        self.stage_keys: dict[int, list[Key]] = {}  # and what it makes
        # What cannot be done again, for want of the stream that enters it, is not looked at.
        self.honest = self.replay(())
        self.rows = {key: row for key, row in self.rows.items() if key in self.honest}
        self.failing = {key for key, row in self.rows.items() if row.status == "diverges"}
        self.unmoved: dict[Key, Effect] = {}  # of whatever bug leaves an activation alone

    def replay(self, bugs: Bugs, call: int | None = None) -> dict[Key, Array]:
        """Run the oracle with some bugs; return what it makes of the rows, or of one call's."""
        problem = self.problem
        wanted = {c for c, _ in self.rows} if call is None else {call}
        calls = sorted({at for c in wanted for at in chain(problem.calls, c)})
        place = {c: index for index, c in enumerate(calls)}
        chosen = [
            call._replace(after=None if call.after is None else place[call.after])
            for call in (problem.calls[c] for c in calls)
        ]
        theirs = {(place[c], name): v for (c, name), v in self.forcing.items() if c in place}
        ops = with_bugs(bugs, problem.plain)
        replaced = {
            name for name, op in vars(ops).items() if op is not getattr(problem.plain, name)
        }
        seen: set[str] = set()
        if not bugs:
            ops = Watched(ops, seen)
        oracle = Replay(problem.config, chosen, self.low, ops, trusts=True)
        tables = set(seen)
        found: dict[Key, Array] = {}
        for stage in self.stages if self.forced else problem.stages():
            if bugs and self.forced and not replaced & self.used[stage]:
                same = self.stage_keys[stage]
                found |= {key: self.honest[key] for key in same if key[0] in place}
                continue
            seen.clear()
            made = oracle.run(stage, theirs if self.forced else None)
            keys = {(calls[index], name): value for (index, name), value in made.items()}
            kept = {key: value for key, value in keys.items() if key in self.rows}
            if not bugs:
                self.used[stage], self.stage_keys[stage] = seen | tables, list(kept)
            found |= kept
        return found

    def effects(self, bugs: Bugs, call: int | None = None) -> dict[Key, Effect]:
        """Compare what the bugs make of each activation with theirs."""
        return {
            key: self._effect(key, value, bugs) for key, value in self.replay(bugs, call).items()
        }

    def _effect(self, key: Key, value: Array, bugs: Bugs) -> Effect:
        row, theirs, honest = self.rows[key], self.theirs[key], self.honest[key]
        assert row.own is not None
        bound = row.own.loosest
        # As of most: a bug touches its own operation's alone.
        if value is honest or (value.shape == honest.shape and bool((value == honest).all())):
            if key not in self.unmoved:
                error = errors(theirs, honest)
                self.unmoved[key] = Effect(error.within(bound), error.rms, math.inf, moves=False)
            return self.unmoved[key]
        unlike = math.inf
        alone = bugs[0].known_by if len(bugs) == 1 and row.status == "diverges" else "value"
        if alone == "size" and _everywhere(theirs - honest):
            sizes = errors(value, honest).rms, errors(theirs, honest).rms
            if min(sizes) > 0 and max(sizes) < math.inf:
                unlike = abs(math.log(sizes[0] / sizes[1])) / math.log(SIZE_FACTOR)
        elif alone == "nothing" and errors(value, honest).rms > row.own.bound.rms:
            unlike = abs(correlation(theirs, honest)) / UNRELATED
        if unlike == math.inf and _is_out(theirs, value, bound):
            return ELSEWHERE
        error = errors(theirs, value)
        return Effect(error.within(bound), error.rms, unlike, moves=True)


def _is_out(theirs: Array, value: Array, bound: Errors) -> bool:
    """Return whether the worst element alone is over the bound: most are, and this is quick."""
    if theirs.shape != value.shape:
        return True
    with np.errstate(invalid="ignore"):
        worst = np.abs(theirs - value).max()
    return not worst <= bound.worst * np.abs(value).max()


def _everywhere(error: Array) -> bool:
    return bool(np.mean(np.abs(error) > 0.1 * np.sqrt(np.mean(error**2))) > TOUCHED)


def correlation(a: Array, b: Array) -> float:
    """Return the mean correlation over the last axis."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(np.mean((a * b).sum(-1) / np.where(size == 0, 1.0, size)))


def diagnose(problem: Problem, rows: Sequence[Row], start: Start) -> Diagnosis:
    """Explain the rows that diverge by as few known bugs as will do.

    Single bugs that give the very values first, then pairs of them, then those that are known
    by the size of their error alone. All bugs are tried on a few stages; those found, on all.
    """
    wrong = [row for row in rows if row.status == "diverges" and row.name != KL]
    if not wrong:
        return Diagnosis([], [])
    stages = sorted({problem.stage(row) for row in wrong})
    # And a layer that may be right: what a bug would change there speaks against it.
    chosen = sorted({*stages[:FIRST], stages[-1], problem.first})
    look = Look(problem, rows, chosen)
    advance = start("known bugs", len(FORWARD))
    single: list[Suspect] = []
    for bug in FORWARD:
        single.append(((bug,), look.effects((bug,))))
        advance()
    left = set(look.failing)
    findings = cover(look.rows, single, left)
    if left:
        findings += cover(look.rows, _pairs(look, single, left, start), left)
    if left and look.forced:  # the logits' error has any size, for any reason
        findings += cover(look.rows, single, left, by_likeness=True)
    explained = look.failing - left
    others = [stage for stage in stages if stage not in chosen] if findings else []
    advance = start("the other layers", len(others))
    for stage in others:
        here = Look(problem, rows, [stage])
        left = set(here.failing)
        findings = [_also(finding, here, left) for finding in findings]
        explained |= here.failing - left
        advance()
    return Diagnosis(findings, [row for row in wrong if (row.call, row.name) not in explained])


def _also(finding: Finding, here: Look, left: set[Key]) -> Finding:
    """Try a finding on one more stage; take what it explains there out of ``left``."""
    suspect = finding.suspects[0], here.effects(finding.suspects[0])
    for more in cover(here.rows, [suspect], left, finding.how != "value"):
        finding = finding._replace(
            explains=finding.explains + more.explains, against=finding.against + more.against
        )
    return finding


def cover(
    rows: Mapping[Key, Row],
    suspects: Sequence[Suspect],
    left: set[Key],
    by_likeness: bool = False,
) -> list[Finding]:
    """Take the suspects that explain most of ``left`` and contradict the fewest right rows.

    What is explained is taken out of ``left``. Likeness is weak evidence: a single
    contradiction clears a suspect of it.
    """
    findings: list[Finding] = []
    while left:
        scores = []
        for _, found in suspects:
            alike, unlike = _alike(found, left)
            fitting = {k for k in left if k in found and found[k].fits and found[k].moves}
            explained = alike if by_likeness else fitting
            # A bug may be in one layer alone; a rounding is everywhere.
            layers = {rows[key].layer for key in explained}
            against = sum(
                not effect.fits
                for key, effect in found.items()
                if rows[key].status in ("ok", "inherits")
                and (by_likeness or rows[key].layer in layers)
            )
            if by_likeness and against:
                explained = set()
            score = (len(explained), -against, -unlike if by_likeness else 0.0)
            # A rounding that gives most values exactly explains the few that fell otherwise.
            scores.append((*score, explained | alike if explained else set()))
        best = max((score[:-1] for score in scores), default=(0, 0))
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
        bugs, found = guilty[0]
        findings.append(
            Finding(
                tuple(suspect[0] for suspect in guilty),
                bugs[0].known_by if by_likeness else "value",
                row,
                row.own.error.rms,
                found[first].error,
                len(explained),
                -int(best[1]),
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


def _pairs(look: Look, single: Sequence[Suspect], left: set[Key], start: Start) -> list[Suspect]:
    """Try two bugs at once, on the cheapest call that is unexplained; return those that fit there.

    Only bugs that change anything there are tried, and never two of one operation.
    """
    calls = look.problem.calls
    size = {c: sum(calls[at].tokens.size for at in chain(calls, c)) for c, _ in left}
    target = min((key for key in look.rows if key in left), key=lambda key: size[key[0]])
    active = [bugs[0] for bugs, found in single if found[target].moves]
    pairs = [pair for pair in combinations(active, 2) if pair[0].operation != pair[1].operation]
    advance = start("pairs of bugs", len(pairs))
    fitting: list[Suspect] = []
    for pair in pairs:
        if look.effects(pair, target[0])[target].fits:
            fitting.append((pair, look.effects(pair)))
        advance()
    return fitting
