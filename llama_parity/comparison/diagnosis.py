"""Find the known bugs with which the oracle's activations equal the other side's.

Every operation that went wrong is run again by the oracle with each known bug in it, on the
other side's own input, and then with pairs of bugs. Where the other side shows its logits alone,
the whole oracle is run again instead.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from reference_np.mutants import FORWARD

from .comparison import Comparison
from .differences_by_design import by_design
from .judging import KL, RIGHT, Row
from .progress import Start
from .replay import Key
from .screening import Screening
from .trace_format import call_chain
from .trials import Effect, Suspect, Trials
from .variants import Bugs

PAIRS_AT_ONCE = 64  # each of them holds residual streams and tables of its own
# Every bug is tried on this many stages that went wrong, and on the last one of them; those that
# explain something there, on all.
FIRST_STAGES = 2

HOW = {
    "value": "equals the oracle with",
    "size": "is reproduced by no known bug, but errs as much as, and only where, the oracle with",
    "nothing": "is as unrelated to the oracle's as with",
}


class Explanation(NamedTuple):
    """The bug that explains some diverging rows: one, several at once, or one of several."""

    suspects: tuple[Bugs, ...]  # each alone explains the rows; this input cannot part them
    how: str  # a key of HOW
    row: Row  # the first one explained
    before: float  # its error
    after: float  # its error against the oracle with the bug
    explains: int  # rows
    contradictions: int  # rows that are right and that the bug would change


class Diagnosis(NamedTuple):
    """The explanations of diverging rows, and the diverging rows without one."""

    explanations: list[Explanation]
    unexplained: list[Row]


def diagnose(comparison: Comparison, rows: Sequence[Row], start: Start) -> Diagnosis:
    """Explain the rows that diverge by as few known bugs as will do.

    Single bugs that give the very values come first, then pairs of them, then bugs that are known
    by the size of their error. All bugs are tried on a few stages, and those found there on all.
    """
    wrong = [row for row in rows if row.status == "diverges" and row.name != KL]
    if not wrong:
        return Diagnosis([], [])
    stages = sorted({comparison.stage_of(row) for row in wrong})
    # The first stage may be right: a bug that would change it is contradicted there.
    chosen = sorted({*stages[:FIRST_STAGES], stages[-1], comparison.first_layer})
    trials = Trials(comparison, rows, chosen)
    known = [*FORWARD, *by_design(comparison.config, comparison.precision)]
    bugs: list[Bugs] = [(bug,) for bug in known]
    single: list[Suspect]
    if trials.teacher_forced:
        advance = start("known bugs", len(known) * len(trials.stages))
        single = list(zip(bugs, trials.effects(bugs, advance), strict=True))
    else:
        screening = Screening(trials, bugs, start)
        single = screening.find_bugs()
    unexplained = set(trials.failing)
    explanations = greedy_set_cover(trials.rows, single, unexplained)
    if unexplained:
        if trials.teacher_forced:
            pairs = _pairs(trials, single, unexplained, start)
        else:
            pairs = screening.find_pairs(unexplained)
        explanations += greedy_set_cover(trials.rows, pairs, unexplained)
    if unexplained and trials.teacher_forced:  # an inherited error has any size, for any reason
        explanations += greedy_set_cover(trials.rows, single, unexplained, by_likeness=True)
    explained = trials.failing - unexplained
    others = [stage for stage in stages if stage not in chosen] if explanations else []
    advance = start("the other layers", len(others))
    for stage in others:
        here = Trials(comparison, rows, [stage])
        unexplained = set(here.failing)
        effects = here.effects([explanation.suspects[0] for explanation in explanations])
        explanations = [
            _extend(explanation, effect, here, unexplained)
            for explanation, effect in zip(explanations, effects, strict=True)
        ]
        explained |= here.failing - unexplained
        advance()
    left = [row for row in wrong if (row.call, row.name) not in explained]
    return Diagnosis(explanations, left)


def _extend(
    explanation: Explanation, effects: Mapping[Key, Effect], here: Trials, unexplained: set[Key]
) -> Explanation:
    """Return an explanation that counts one more stage's rows; remove those it explains."""
    suspect = explanation.suspects[0], effects
    by_likeness = explanation.how != "value"
    for more in greedy_set_cover(here.rows, [suspect], unexplained, by_likeness):
        explanation = explanation._replace(
            explains=explanation.explains + more.explains,
            contradictions=explanation.contradictions + more.contradictions,
        )
    return explanation


def greedy_set_cover(
    rows: Mapping[Key, Row],
    suspects: Sequence[Suspect],
    unexplained: set[Key],
    by_likeness: bool = False,
) -> list[Explanation]:
    """Choose, again and again, the suspects that explain most and contradict the fewest rows.

    Rows are removed from ``unexplained`` once they are explained. ``by_likeness``: a suspect
    explains a row whose error is like its own, in place of one with its very values. This is weak
    evidence, and one contradiction rules a suspect out.
    """
    explanations: list[Explanation] = []
    while unexplained:
        scores = [_score(rows, effects, unexplained, by_likeness) for _, effects in suspects]
        best = max((score.rank for score in scores), default=(0, 0, 0.0))
        if best[0] == 0:
            return explanations
        explained = next(score.explained for score in scores if score.rank == best)
        guilty = [
            suspect
            for suspect, score in zip(suspects, scores, strict=True)
            if score == Score(best, explained)
        ]
        first = next(key for key in rows if key in explained)
        row = rows[first]
        assert row.operation_error is not None
        bugs, effects = guilty[0]
        explanations.append(
            Explanation(
                suspects=tuple(suspect[0] for suspect in guilty),
                how=bugs[0].known_by if by_likeness else "value",
                row=row,
                before=row.operation_error.error.rms,
                after=effects[first].error,
                explains=len(explained),
                contradictions=-int(best[1]),
            )
        )
        unexplained -= explained
    return explanations


class Score(NamedTuple):
    """How well a suspect explains the unexplained rows; a higher rank is better."""

    rank: tuple[int, int, float]  # rows explained, -contradictions, -unlikeness
    explained: set[Key]


def _score(
    rows: Mapping[Key, Row],
    effects: Mapping[Key, Effect],
    unexplained: set[Key],
    by_likeness: bool,
) -> Score:
    """Return how many of the unexplained rows a suspect explains, and how many it contradicts."""
    alike, unlikeness = _alike(effects, unexplained)
    fitting = {
        key for key in unexplained if key in effects and effects[key].fits and effects[key].changes
    }
    explained = alike if by_likeness else fitting
    # A bug may be in one layer alone; a rounding is everywhere.
    layers = {rows[key].layer for key in explained}
    contradictions = sum(
        not effect.fits
        for key, effect in effects.items()
        if rows[key].status in RIGHT and (by_likeness or rows[key].layer in layers)
    )
    if by_likeness and contradictions:
        explained = set()
    rank = (len(explained), -contradictions, -unlikeness if by_likeness else 0.0)
    # A rounding that gives most values exactly explains the few that were rounded otherwise.
    return Score(rank, explained | alike if explained else set())


def _alike(effects: Mapping[Key, Effect], unexplained: set[Key]) -> tuple[set[Key], float]:
    """Return the rows whose errors are like a bug's, and the median of their unlikeness.

    The median counts, since a single tensor of few tokens scatters. No row is alike where it is
    1 or more.
    """
    unlikeness = {
        key: effects[key].unlikeness
        for key in unexplained
        if key in effects and effects[key].unlikeness < math.inf
    }
    typical = float(np.median(list(unlikeness.values()))) if unlikeness else math.inf
    return (set(unlikeness), typical) if typical < 1 else (set(), math.inf)


def _pairs(
    trials: Trials, single: Sequence[Suspect], unexplained: set[Key], start: Start
) -> list[Suspect]:
    """Try two bugs at once on the cheapest call with an unexplained row; return those that fit.

    Only bugs that change that row are tried, and never two of one operation.
    """
    calls = trials.comparison.calls
    size = {c: sum(calls[at].tokens.size for at in call_chain(calls, c)) for c, _ in unexplained}
    target = min((key for key in trials.rows if key in unexplained), key=lambda key: size[key[0]])
    active = [bugs[0] for bugs, effects in single if effects[target].changes]
    pairs = [pair for pair in combinations(active, 2) if pair[0].operation != pair[1].operation]
    advance = start("pairs of bugs", len(pairs))
    fitting: list[Bugs] = []
    for at in range(0, len(pairs), PAIRS_AT_ONCE):
        some = pairs[at : at + PAIRS_AT_ONCE]
        tried = zip(some, trials.effects_on(target, some), strict=True)
        fitting += [pair for pair, effect in tried if effect.fits]
        for _ in some:
            advance()
    effects: list[dict[Key, Effect]] = []
    for at in range(0, len(fitting), PAIRS_AT_ONCE):
        effects += trials.effects(fitting[at : at + PAIRS_AT_ONCE])
    return list(zip(fitting, effects, strict=True))
