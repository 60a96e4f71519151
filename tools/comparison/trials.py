"""The oracle with known bugs in it, on the other side's own input to every operation.

All bugs are tried on one stage before the next, so that its parameters are read once. A stage
that never looks up an operation that a bug replaces is not run again: its values are the honest
ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference_np.model import Ops
from reference_np.mutants import Mutant
from reference_np.ops import Array
from reference_np.tolerances import Errors, errors

from .judging import KL, Row
from .problem import Problem
from .replay import Activations, Inputs, Key, Once, Replay, finite, inputs, stream_before
from .trace_file import Call, chain

# Two ways of rounding one thing err alike within this, typically: a port may round a sum that the
# catalogue's bug keeps. TF32 and bfloat16 differ by 8: of several, the closest is named.
SIZE_FACTOR = 10.0
# Rounding touches everything; a wrong weight or channel does not. This part of the elements must
# err by a tenth of the error's rms.
TOUCHED = 0.1
# Logits of a random head have about this correlation with the right ones, or less.
UNRELATED = 0.2

Bugs = tuple[Mutant, ...]


class Effect(NamedTuple):
    """The error of one activation once a suspect's bugs are in the oracle."""

    fits: bool  # theirs within the bound
    error: float  # theirs against it, relative rms
    # How unlike a bug that is known by its size or by nothing, 1 at the limit; else infinite.
    unlike: float
    moves: bool  # it changes this activation at all


# Of most bugs on most activations: no error is asked for where a suspect does not fit.
ELSEWHERE = Effect(fits=False, error=math.inf, unlike=math.inf, moves=True)

Suspect = tuple[Bugs, Mapping[Key, Effect]]


def with_bugs(bugs: Iterable[Mutant], ops: Ops) -> Ops:
    """Return the operations with every one of ``bugs`` in them."""
    namespace = SimpleNamespace(**vars(ops))
    for bug in bugs:
        namespace = bug.apply(namespace)
    return namespace


def replaced(bugs: Iterable[Mutant]) -> set[str]:
    """Name the operations that some bugs replace."""
    return {name for bug in bugs for name in (bug.operation, *bug.also)}


class Recorder(SimpleNamespace):
    """Operations that record which of them are looked up."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(recorded=ops, used=set())

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self.recorded, name)


class Selection:
    """Some calls with all that they continue, numbered anew, and the other side's activations."""

    def __init__(self, calls: Sequence[Call], wanted: Iterable[int], theirs: Activations) -> None:
        self.places = sorted({at for c in wanted for at in chain(calls, c)})
        place = {c: index for index, c in enumerate(self.places)}
        self.calls = [
            call._replace(after=None if call.after is None else place[call.after])
            for call in (calls[c] for c in self.places)
        ]
        self.theirs = {(place[c], name): v for (c, name), v in theirs.items() if c in place}

    def keys_of(self, found: Activations) -> dict[Key, Array]:
        """Return activations under the numbers that the calls had before."""
        return {(self.places[index], name): value for (index, name), value in found.items()}

    def enters(self, stage: int) -> bool:
        """Return whether the other side gives the stream that enters a stage, of every call."""
        name = stream_before(stage)
        return not name or all((c, name) in self.theirs for c in range(len(self.calls)))


class Trials:
    """Tries bugs on a few stages, or, where nothing but logits is shown, on the whole model."""

    def __init__(self, problem: Problem, rows: Sequence[Row], stages: Sequence[int]) -> None:
        self.problem = problem
        self.theirs: dict[Key, Array] = {}
        for stage in stages:
            self.theirs.update(problem.theirs.read(stage))
        self.usable = finite(self.theirs)
        found = [r for r in rows if r.name != KL and r.own and problem.stage(r) in stages]
        self.forced = any(row.fresh for row in found)
        self.stages = stages if self.forced else problem.stages()
        self.rows = {(row.call, row.name): row for row in found if bool(row.fresh) == self.forced}
        self.honest: dict[Key, Array] = {}
        for _, values in self._replays([()], {c for c, _ in self.rows}, self.stages):
            self.honest |= {key: value for key, value in values.items() if key in self.rows}
        # What cannot be done again, for want of the stream that enters it, is not looked at.
        self.rows = {key: row for key, row in self.rows.items() if key in self.honest}
        self.failing = {key for key, row in self.rows.items() if row.status == "diverges"}
        self.unmoved: dict[Key, Effect] = {}  # of whatever bug leaves an activation alone

    def effects(
        self, suspects: Sequence[Bugs], advance: Callable[[], None] = lambda: None
    ) -> list[dict[Key, Effect]]:
        """Compare what each suspect's bugs make of every activation with theirs."""
        return self._effects(suspects, {c for c, _ in self.rows}, self.stages, advance)

    def effects_on(self, target: Key, suspects: Sequence[Bugs]) -> list[Effect]:
        """Compare what each suspect's bugs make of one activation with theirs."""
        at = self.problem.stage(self.rows[target])
        stages = [stage for stage in self.stages if stage <= at]
        found = self._effects(suspects, {target[0]}, stages, lambda: None)
        return [effects[target] for effects in found]

    def _effects(
        self,
        suspects: Sequence[Bugs],
        wanted: set[int],
        stages: Sequence[int],
        advance: Callable[[], None],
    ) -> list[dict[Key, Effect]]:
        effects: list[dict[Key, Effect]] = [{} for _ in suspects]
        for index, values in self._replays(suspects, wanted, stages):
            bugs, found = suspects[index], effects[index]
            found |= {
                key: self._effect(key, value, bugs)
                for key, value in values.items()
                if key in self.rows
            }
            advance()
        return effects

    def _replays(
        self, suspects: Sequence[Bugs], wanted: set[int], stages: Sequence[int]
    ) -> Iterator[tuple[int, dict[Key, Array]]]:
        """Run the oracle with each suspect's bugs; yield the suspect's index and a stage's values.

        Where they are the honest ones by construction, the very arrays in ``honest`` are given.
        """
        problem = self.problem
        some = Selection(problem.calls, wanted, self.usable)
        theirs = some.theirs if self.forced else None
        recorder = Recorder(problem.plain)
        given = inputs(problem.config, some.calls, problem.low.dtype, recorder)
        behind = recorder.used  # the operations behind the tables and masks
        honest = Replay(problem.config, some.calls, problem.low, recorder, given=given)
        variants = self._variants(suspects, some, given, behind)
        apart = [False] * len(suspects)  # whose streams are not the honest ones
        for stage in stages:
            params, recorder.used = Once(problem.low), set()
            values = some.keys_of(honest.run(stage, theirs, params))
            values = {key: self.honest.get(key, value) for key, value in values.items()}
            used = recorder.used | (behind if 0 <= stage < problem.config.n_layers else set())
            enters = self.forced and some.enters(stage)
            for index, (bugs, replay) in enumerate(zip(suspects, variants, strict=True)):
                if used.isdisjoint(replaced(bugs)) and (enters or not apart[index]):
                    replay.follow(honest)
                    apart[index] = False
                    yield index, values
                else:
                    apart[index] = True
                    yield index, some.keys_of(replay.run(stage, theirs, params))

    def _variants(
        self, suspects: Sequence[Bugs], some: Selection, honest: list[Inputs], behind: set[str]
    ) -> list[Replay]:
        """Return a replay with each suspect's bugs; tables and masks are shared where alike."""
        problem = self.problem
        computed: dict[tuple[str, ...], list[Inputs]] = {(): honest}
        found = []
        for bugs in suspects:
            ops = with_bugs(bugs, problem.plain)
            touching = tuple(bug.name for bug in bugs if not behind.isdisjoint(replaced([bug])))
            if touching not in computed:
                computed[touching] = inputs(problem.config, some.calls, problem.low.dtype, ops)
            given = computed[touching]
            found.append(Replay(problem.config, some.calls, problem.low, ops, given=given))
        return found

    def _unmoved(self, key: Key) -> Effect:
        """Compare the honest oracle's value of an activation with theirs."""
        if key not in self.unmoved:
            own, error = self.rows[key].own, errors(self.theirs[key], self.honest[key])
            assert own is not None
            fits = error.within(own.loosest)
            self.unmoved[key] = Effect(fits, error.rms, math.inf, moves=False)
        return self.unmoved[key]

    def _effect(self, key: Key, value: Array, bugs: Bugs) -> Effect:
        row, theirs, honest = self.rows[key], self.theirs[key], self.honest[key]
        assert row.own is not None
        # As of most: a bug touches its own operation's alone.
        if value is honest or (value.shape == honest.shape and (value == honest).all()):
            return self._unmoved(key)
        bound = row.own.loosest
        unlike = math.inf
        alone = bugs[0].known_by if len(bugs) == 1 and row.status == "diverges" else "value"
        if alone == "size" and _everywhere(theirs - honest):
            sizes = errors(value, honest).rms, self._unmoved(key).error
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
