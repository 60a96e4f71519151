"""Which known bug makes the oracle compute what the other side computed.

Every operation that went wrong is done again by the oracle with each known bug in it, on the
other side's own input, and so are pairs of bugs. Where the other side shows its logits alone,
the whole oracle is run again instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from reference_np.mutants import FORWARD

from .judging import KL, RIGHT, Row
from .problem import Problem
from .replay import Key
from .trace_file import chain
from .trials import Bugs, Effect, Suspect, Trials

TOGETHER = 64  # pairs tried side by side: each holds streams and tables of its own
FIRST = 2  # stages on which every bug is tried, and the last one: what it explains, on all

Start = Callable[[str, int], Callable[[], None]]
HOW = {
    "value": "equals the oracle with",
    "size": "is reproduced by no known bug, but errs as much as, and only where, the oracle with",
    "nothing": "is as unrelated to the oracle's as with",
}


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
    trials = Trials(problem, rows, chosen)
    advance = start("known bugs", len(FORWARD) * len(trials.stages))
    bugs: list[Bugs] = [(bug,) for bug in FORWARD]
    single: list[Suspect] = list(zip(bugs, trials.effects(bugs, advance), strict=True))
    left = set(trials.failing)
    findings = cover(trials.rows, single, left)
    if left:
        findings += cover(trials.rows, _pairs(trials, single, left, start), left)
    if left and trials.forced:  # the logits' error has any size, for any reason
        findings += cover(trials.rows, single, left, by_likeness=True)
    explained = trials.failing - left
    others = [stage for stage in stages if stage not in chosen] if findings else []
    advance = start("the other layers", len(others))
    for stage in others:
        here = Trials(problem, rows, [stage])
        left = set(here.failing)
        effects = here.effects([finding.suspects[0] for finding in findings])
        both = zip(findings, effects, strict=True)
        findings = [_also(finding, found, here, left) for finding, found in both]
        explained |= here.failing - left
        advance()
    return Diagnosis(findings, [row for row in wrong if (row.call, row.name) not in explained])


def _also(finding: Finding, effects: Mapping[Key, Effect], here: Trials, left: set[Key]) -> Finding:
    """Count the rows of one more stage that a finding explains; take them out of ``left``."""
    suspect = finding.suspects[0], effects
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
        scores = [_score(rows, found, left, by_likeness) for _, found in suspects]
        best = max((score.rank for score in scores), default=(0, 0, 0.0))
        if best[0] == 0:
            return findings
        explained = next(score.explained for score in scores if score.rank == best)
        guilty = [
            suspect
            for suspect, score in zip(suspects, scores, strict=True)
            if score == Score(best, explained)
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


class Score(NamedTuple):
    """How well a suspect explains what is left, to be compared with others."""

    rank: tuple[int, int, float]  # rows explained, minus those contradicted, minus unlikeness
    explained: set[Key]


def _score(
    rows: Mapping[Key, Row], found: Mapping[Key, Effect], left: set[Key], by_likeness: bool
) -> Score:
    """Return how many of ``left`` a suspect explains and how many right rows it contradicts."""
    alike, unlike = _alike(found, left)
    fitting = {k for k in left if k in found and found[k].fits and found[k].moves}
    explained = alike if by_likeness else fitting
    # A bug may be in one layer alone; a rounding is everywhere.
    layers = {rows[key].layer for key in explained}
    against = sum(
        not effect.fits
        for key, effect in found.items()
        if rows[key].status in RIGHT and (by_likeness or rows[key].layer in layers)
    )
    if by_likeness and against:
        explained = set()
    rank = (len(explained), -against, -unlike if by_likeness else 0.0)
    # A rounding that gives most values exactly explains the few that fell otherwise.
    return Score(rank, explained | alike if explained else set())


def _alike(found: Mapping[Key, Effect], left: set[Key]) -> tuple[set[Key], float]:
    """Return the rows that a bug known by its size (or by nothing) explains, and how unlike it.

    The median counts: a single tensor of few tokens scatters.
    """
    unlike = {k: found[k].unlike for k in left if k in found and found[k].unlike < math.inf}
    typical = float(np.median(list(unlike.values()))) if unlike else math.inf
    return (set(unlike), typical) if typical < 1 else (set(), math.inf)


def _pairs(
    trials: Trials, single: Sequence[Suspect], left: set[Key], start: Start
) -> list[Suspect]:
    """Try two bugs at once, on the cheapest call that is unexplained; return those that fit there.

    Only bugs that change anything there are tried, and never two of one operation.
    """
    calls = trials.problem.calls
    size = {c: sum(calls[at].tokens.size for at in chain(calls, c)) for c, _ in left}
    target = min((key for key in trials.rows if key in left), key=lambda key: size[key[0]])
    active = [bugs[0] for bugs, found in single if found[target].moves]
    pairs = [pair for pair in combinations(active, 2) if pair[0].operation != pair[1].operation]
    advance = start("pairs of bugs", len(pairs))
    fitting: list[Bugs] = []
    for at in range(0, len(pairs), TOGETHER):
        some = pairs[at : at + TOGETHER]
        tried = zip(some, trials.effects_on(target, some), strict=True)
        fitting += [pair for pair, effect in tried if effect.fits]
        for _ in some:
            advance()
    found = (trials.effects(fitting[at : at + TOGETHER]) for at in range(0, len(fitting), TOGETHER))
    return list(zip(fitting, [effects for several in found for effects in several], strict=True))
