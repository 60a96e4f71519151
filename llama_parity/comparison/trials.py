"""Measure what known bugs make of the oracle's activations, on the other side's own input."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reference_np.ops import Array
from reference_np.tolerances import Errors, errors

from .comparison import Comparison
from .judging import KL, Row
from .kept_params import keep_if_small
from .padding import readable, without_padding
from .replay import Key, finite_only
from .trace_format import LOGPROBS
from .variants import Bugs, CallSubset, run_variants

# A port's rounding errs like the catalogue's within this factor, typically: it may round a sum
# that the catalogue's bug keeps. TF32 and bfloat16 differ by 8: of several, the closest is named.
SIZE_FACTOR = 10.0
# Rounding touches everything; a wrong weight or channel does not. More than this part of the
# elements must err by a tenth of the error's rms.
TOUCHED = 0.1
# Logits of a random head correlate with the right ones by about this, or less.
UNRELATED = 0.2


class Effect(NamedTuple):
    """What a suspect's bugs make of one activation, measured against the other side's."""

    fits: bool  # the other side's activation is within its bound
    error: float  # relative rms of the other side's activation against it
    # How unlike its error is to a bug's that is known by the error's size or by being unrelated:
    # 1 at the limit, infinite beyond it and for all other bugs.
    unlikeness: float
    changes: bool  # it is not the bug-free oracle's activation


# Of a suspect with whose value the worst element alone is over its bound, as with most: no other
# error is computed then.
NO_FIT = Effect(fits=False, error=math.inf, unlikeness=math.inf, changes=True)

Suspect = tuple[Bugs, Mapping[Key, Effect]]


class Trials:
    """Tries bugs on some stages; on the whole model where the other side shows logits alone."""

    def __init__(self, comparison: Comparison, rows: Sequence[Row], stages: Sequence[int]) -> None:
        self.comparison = comparison
        theirs: dict[Key, Array] = {}
        for stage in stages:
            theirs.update(comparison.theirs.read(stage))
        self.finite_theirs = finite_only(readable(theirs, comparison.padding))
        self.theirs = without_padding(theirs, comparison.padding)
        # Log-probabilities beside logits are of an operation that the catalogue has no bug of.
        left_out = (KL, LOGPROBS) if comparison.shows_logits() else (KL,)
        measured = [
            row
            for row in rows
            if row.name not in left_out
            and row.operation_error
            and comparison.stage_of(row) in stages
        ]
        self.teacher_forced = any(row.fresh for row in measured)
        if not self.teacher_forced:  # the whole model runs for every few bugs
            params = keep_if_small(comparison.baseline_params, comparison.config)
            self.comparison = comparison = comparison._replace(baseline_params=params)
        self.stages = stages if self.teacher_forced else comparison.stages()
        self.rows = {
            (row.call, row.name): row for row in measured if bool(row.fresh) == self.teacher_forced
        }
        self.bug_free: dict[Key, Array] = {}
        for _, values in self._replays([()], {c for c, _ in self.rows}, self.stages):
            found = {key: value for key, value in values.items() if key in self.rows}
            self.bug_free |= without_padding(found, comparison.padding)
        # An activation that the oracle cannot compute again, for want of its stage's residual
        # stream, is left out.
        self.rows = {key: row for key, row in self.rows.items() if key in self.bug_free}
        self.failing = {key for key, row in self.rows.items() if row.status == "diverges"}
        self.unchanged: dict[Key, Effect] = {}  # effects of bugs that leave an activation alone

    def effects(
        self, suspects: Sequence[Bugs], advance: Callable[[], None] = lambda: None
    ) -> list[dict[Key, Effect]]:
        """Return the effect of each suspect's bugs on every activation."""
        return self._effects(suspects, {c for c, _ in self.rows}, self.stages, advance)

    def effects_on(
        self, target: Key, suspects: Sequence[Bugs], advance: Callable[[], None] = lambda: None
    ) -> list[Effect]:
        """Return the effect of each suspect's bugs on one activation."""
        last = self.comparison.stage_of(self.rows[target])
        stages = [stage for stage in self.stages if stage <= last]
        by_suspect = self._effects(suspects, {target[0]}, stages, advance)
        return [effects[target] for effects in by_suspect]

    def _effects(
        self,
        suspects: Sequence[Bugs],
        wanted: set[int],
        stages: Sequence[int],
        advance: Callable[[], None],
    ) -> list[dict[Key, Effect]]:
        effects: list[dict[Key, Effect]] = [{} for _ in suspects]
        for index, values in self._replays(suspects, wanted, stages):
            effects[index] |= {
                key: self._effect(key, value, suspects[index])
                for key, value in values.items()
                if key in self.rows
            }
            advance()
        return effects

    def _replays(
        self, suspects: Sequence[Bugs], wanted: set[int], stages: Sequence[int]
    ) -> Iterator[tuple[int, dict[Key, Array]]]:
        """Run the oracle with each suspect's bugs; yield the suspect's index and a stage's values.

        Where no operation that the stage uses is replaced, the very arrays in ``bug_free`` are
        yielded.
        """
        subset = CallSubset(self.comparison.calls, wanted, self.finite_theirs)
        theirs = subset.theirs if self.teacher_forced else None
        for index, values, is_bug_free in run_variants(
            self.comparison, suspects, subset, stages, theirs
        ):
            if is_bug_free:
                values = {key: self.bug_free.get(key, value) for key, value in values.items()}
            yield index, values

    def _unchanged(self, key: Key) -> Effect:
        """Return the effect of a bug that leaves an activation as the bug-free oracle has it."""
        if key not in self.unchanged:
            measure = self.rows[key].operation_error
            assert measure is not None
            error = errors(self.theirs[key], self.bug_free[key])
            fits = error.within(measure.loosest_bound)
            self.unchanged[key] = Effect(fits, error.rms, math.inf, changes=False)
        return self.unchanged[key]

    def _effect(self, key: Key, value: Array, bugs: Bugs) -> Effect:
        """Return the effect of bugs that make ``value`` of an activation."""
        row, theirs, bug_free = self.rows[key], self.theirs[key], self.bug_free[key]
        assert row.operation_error is not None
        # True of most activations: a bug touches those of its own operation alone.
        if value is not bug_free:
            value = without_padding({key: value}, self.comparison.padding)[key]
        if value is bug_free or (value.shape == bug_free.shape and (value == bug_free).all()):
            return self._unchanged(key)
        bound = row.operation_error.loosest_bound
        unlikeness = math.inf
        known_by = bugs[0].known_by if len(bugs) == 1 and row.status == "diverges" else "value"
        if known_by == "size" and _is_everywhere(theirs - bug_free):
            sizes = errors(value, bug_free).rms, self._unchanged(key).error
            if min(sizes) > 0 and max(sizes) < math.inf:
                unlikeness = abs(math.log(sizes[0] / sizes[1])) / math.log(SIZE_FACTOR)
        elif known_by == "nothing" and errors(value, bug_free).rms > row.operation_error.bound.rms:
            unlikeness = abs(correlation(theirs, bug_free)) / UNRELATED
        if unlikeness == math.inf and _worst_is_out(theirs, value, bound):
            return NO_FIT
        error = errors(theirs, value)
        return Effect(error.within(bound), error.rms, unlikeness, changes=True)


def _worst_is_out(theirs: Array, value: Array, bound: Errors) -> bool:
    """Return whether the worst element alone is over the bound, as is true of most suspects.

    This is quicker than ``errors``.
    """
    if theirs.shape != value.shape:
        return True
    with np.errstate(invalid="ignore"):
        worst = np.abs(theirs - value).max()
    return not worst <= bound.worst * np.abs(value).max()


def _is_everywhere(error: Array) -> bool:
    return bool(np.mean(np.abs(error) > 0.1 * np.sqrt(np.mean(error**2))) > TOUCHED)


def correlation(a: Array, b: Array) -> float:
    """Return the mean correlation of two arrays over their last axis."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(np.mean((a * b).sum(-1) / np.where(size == 0, 1.0, size)))
