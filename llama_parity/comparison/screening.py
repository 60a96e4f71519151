"""Screen known bugs on the fewest tokens that fail, where the other side shows its logits alone.

To run the whole oracle on every call with every bug, and with hundreds of pairs of them, takes
minutes. A bug that explains a call's logits explains those of its first tokens, and of some words
of the vocabulary: what does not is left out, and only the rest is run whole. Bugs by which tokens
look ahead are known by the first token's logits, which the tokens after it change.
"""

from collections.abc import Callable, Sequence, Set
from itertools import combinations

import numpy as np

from reference_np.ops import Array, causal_mask
from reference_np.tolerances import errors

from .padding import without_padding
from .progress import Start
from .replay import Key
from .report_rows import counted
from .trace_format import LOGPROBS, Call, call_chain
from .trials import Effect, Suspect, Trials
from .variants import Bugs, CallSubset, run_variants

AT_ONCE = 64  # variants, each with residual streams and tables of its own
WORDS = 256  # of the vocabulary
TOKENS = 4  # of the longer prefix, at least; the shorter one is a single token
# A prefix is a part of the tensor whose bound is known, and may be smaller than the rest.
SLACK = 10.0


class Prefix:
    """The logits of a call's first tokens, for some words, and what bugs make of them.

    ``target`` is the call's key in the trials, ``length`` the number of tokens.
    """

    def __init__(self, trials: Trials, target: Key, length: int) -> None:
        self.trials, self.target, self.length = trials, target, length
        calls = list(trials.comparison.calls)
        if target[1] != LOGPROBS:  # which are not computed from some words alone
            calls = [call._replace(targets=None) for call in calls]
        calls[target[0]] = _shortened(calls[target[0]], length)
        self.subset = CallSubset(calls, {target[0]}, {})
        theirs, exact = trials.theirs[target], trials.bug_free[target]
        self.words: Array | None = None  # a log-probability takes all logits
        self.theirs = theirs[:, :length]
        if target[1] != LOGPROBS:
            self.words = _words(np.abs(theirs - exact).max(axis=(0, 1)))
            self.theirs = theirs[:, :length, self.words]
        bound = trials.rows[target].operation_error
        assert bound is not None
        self.limit = SLACK * bound.loosest_bound.token
        (self.bug_free,) = self.logits([()], silent)

    def logits(
        self, suspects: Sequence[Bugs], start: Start, title: str = "known bugs"
    ) -> list[Array]:
        """Return the logits [B, length, words] with each suspect's bugs, zeros at padding.

        Of a target of log-probabilities those [B, length]. ``start`` shows how far it is, stage by
        stage, under a title.
        """
        stages, c = self.trials.comparison.stages(), self.target[0]
        padding = list(self.trials.comparison.padding)
        if (of_call := padding[c]) is not None:
            padding[c] = of_call[:, : self.length]
        title += f", {counted(self.length, 'token')}"
        advance = start(title, len(suspects) * len(stages))
        found: list[Array] = []
        for at in range(0, len(suspects), AT_ONCE):
            some = suspects[at : at + AT_ONCE]
            last: dict[int, Array] = {}
            for index, values, _ in run_variants(
                self.trials.comparison, some, self.subset, stages, words=self.words
            ):
                advance()
                if self.target in values:
                    of_target = {self.target: values[self.target]}
                    last[index] = without_padding(of_target, padding)[self.target]
            found += [last[index] for index in range(len(some))]
        return found

    def fits(self, logits: Array) -> bool:
        """Return whether the other side's logits are about as near as their bound."""
        return errors(self.theirs, logits).token <= self.limit

    def is_changed(self, logits: Array) -> bool:
        """Return whether logits are not the bug-free oracle's."""
        return not np.array_equal(logits, self.bug_free, equal_nan=True)


class Screen:
    """The prefixes of one call, and what each bug alone makes of them.

    ``alone``: for each prefix the logits by the bug's name. A bug of the matrix products, which
    round every weight and see one token each, is run on a longer prefix only if it fits the first.
    """

    def __init__(self, trials: Trials, target: Key, bugs: Sequence[Bugs], start: Start) -> None:
        self.trials, self.target = trials, target
        self.prefixes = [Prefix(trials, target, length) for length in _lengths(trials, target)]
        self.alone: list[dict[str, Array]] = []
        left = list(bugs)
        for prefix in self.prefixes:
            logits = prefix.logits(left, start)
            by_bug = list(zip(left, logits, strict=True))
            self.alone.append({bug.name: value for (bug,), value in by_bug})
            left = [one for one, v in by_bug if one[0].operation != "linear" or prefix.fits(v)]
        self.look_ahead = {name for name in self.alone[-1] if self._looks_ahead(name)}

    def _looks_ahead(self, name: str) -> bool:
        """Return whether the tokens after the first change its logits."""
        if len(self.prefixes) == 1:  # the whole call
            return False
        first, more = self.alone[0][name], self.alone[-1][name]
        return errors(first, more[:, : first.shape[1]]).token > self.prefixes[0].limit

    def passing_bugs(self, bugs: Sequence[Bugs]) -> list[Bugs]:
        """Return the bugs that may explain the call: those that fit every prefix, or look ahead."""
        return [
            (bug,)
            for (bug,) in bugs
            if bug.name in self.look_ahead
            or all(
                bug.name in alone and prefix.fits(alone[bug.name])
                for prefix, alone in zip(self.prefixes, self.alone, strict=True)
            )
        ]

    def passing_pairs(self, pairs: Sequence[Bugs], start: Start) -> list[Bugs]:
        """Return the pairs of bugs that may explain the call.

        On a prefix that one of two bugs leaves as it is, the pair does what the other does alone:
        only pairs of bugs that both change it are run.
        """
        ahead = [pair for pair in pairs if not self.look_ahead.isdisjoint(b.name for b in pair)]
        left = [pair for pair in pairs if self.look_ahead.isdisjoint(b.name for b in pair)]
        for prefix, alone in zip(self.prefixes, self.alone, strict=True):
            changing = {name for name, logits in alone.items() if prefix.is_changed(logits)}
            # By the names of the bugs that change the prefix.
            fits: dict[tuple[str, ...], bool] = {(): prefix.fits(prefix.bug_free)}
            fits |= {(name,): prefix.fits(logits) for name, logits in alone.items()}
            active = [tuple(bug.name for bug in pair if bug.name in changing) for pair in left]
            to_run = [pair for pair, names in zip(left, active, strict=True) if len(names) == 2]
            logits = prefix.logits(to_run, start, "pairs of bugs")
            for (one, other), value in zip(to_run, logits, strict=True):
                fits[one.name, other.name] = prefix.fits(value)
            left = [pair for pair, names in zip(left, active, strict=True) if fits[names]]
        whole = Prefix(self.trials, self.target, self.trials.theirs[self.target].shape[1])
        logits = whole.logits(ahead, start, "pairs of bugs that look ahead")
        passing = [pair for pair, value in zip(ahead, logits, strict=True) if whole.fits(value)]
        return [*left, *passing]


def _shortened(call: Call, length: int) -> Call:
    """Return the first tokens of a call that continues no other, or the whole of another."""
    if length == call.tokens.shape[1]:
        return call
    positions, mask, targets = call.positions, call.mask, call.targets
    return call._replace(
        tokens=call.tokens[:, :length],
        positions=None if positions is None else positions[:, :length],
        mask=None if mask is None else mask[:, :length, :length],
        targets=None if targets is None else targets[:, :length],
    )


def _words(error: Array) -> Array:
    """Return ids of the vocabulary: evenly spaced ones, and that of the largest error [V]."""
    step = -(-len(error) // WORDS)
    return np.unique(np.append(np.arange(0, len(error), step), error.argmax()))


def _lengths(trials: Trials, target: Key) -> list[int]:
    """Return the numbers of tokens of a call's prefixes, two; one where it has to be run whole.

    The longer prefix has so many that its logits fail. Only a call that continues no other, and
    in which no token attends to later ones, has the same logits without its last tokens.
    """
    call = trials.comparison.calls[target[0]]
    n_tokens = call.tokens.shape[1]
    is_causal = call.mask is None or not (call.mask & ~causal_mask(*call.mask.shape[1:])).any()
    if call.after is not None or not is_causal or n_tokens == 1:
        return [n_tokens]
    theirs, exact = trials.theirs[target], trials.bug_free[target]
    row = trials.rows[target].operation_error
    assert row is not None
    failing = (
        n
        for n in range(1, n_tokens + 1)
        if errors(theirs[:, n - 1 : n], exact[:, n - 1 : n]).token > row.loosest_bound.token
    )
    return [1, min(n_tokens, max(next(failing, n_tokens), TOKENS))]


def _cheapest(trials: Trials, keys: Set[Key]) -> Key:
    """Return the activation whose call, with those that it continues, has the fewest tokens."""
    calls = trials.comparison.calls
    return min(
        (key for key in trials.rows if key in keys),
        key=lambda key: sum(calls[c].tokens.size for c in call_chain(calls, key[0])),
    )


def silent(title: str, steps: int) -> Callable[[], None]:
    """Show no progress: a ``Start`` for short runs."""
    return lambda: None


class Screening:
    """Finds the bugs that explain a port's logits, call by call; keeps the screens of the calls."""

    def __init__(self, trials: Trials, bugs: Sequence[Bugs], start: Start) -> None:
        self.trials, self.bugs, self.start = trials, bugs, start
        self.screens: dict[Key, Screen] = {}

    def find_bugs(self) -> list[Suspect]:
        """Return the bugs that explain a failing call's logits, with their effect on all calls.

        The cheapest call is screened first; another only where it is left unexplained, and where
        it continues none that is.
        """
        trials, calls = self.trials, self.trials.comparison.calls
        found: list[Suspect] = []
        left = list(self.bugs)
        to_screen, unexplained = set(trials.failing), set(trials.failing)
        while to_screen:
            target = _cheapest(trials, to_screen)
            to_screen.remove(target)
            if any((c, target[1]) in unexplained for c in call_chain(calls, target[0])[:-1]):
                continue
            passing = self._screen(target, left).passing_bugs(left)
            passing = self._confirmed(target, passing)
            for suspect in zip(passing, self._effects(passing), strict=True):
                found.append(suspect)
                left = [one for one in left if one is not suspect[0]]
                unexplained -= {k for k, e in suspect[1].items() if e.fits and e.changes}
            to_screen &= unexplained
        return sorted(found, key=lambda suspect: self.bugs.index(suspect[0]))

    def find_pairs(self, unexplained: Set[Key]) -> list[Suspect]:
        """Return the pairs of bugs that explain the cheapest unexplained call, with their effects.

        Never two of one operation, and none that rounds the matrix products: to round every weight
        takes longer than all else, and another port's products are rounded otherwise.
        """
        bugs = [(bug,) for (bug,) in self.bugs if bug.operation != "linear"]
        target = _cheapest(self.trials, unexplained)
        pairs = [
            (*one, *other)
            for one, other in combinations(bugs, 2)
            if one[0].operation != other[0].operation
        ]
        passing = self._screen(target, bugs).passing_pairs(pairs, self.start)
        passing = self._confirmed(target, passing)
        return list(zip(passing, self._effects(passing), strict=True))

    def _screen(self, target: Key, bugs: Sequence[Bugs]) -> Screen:
        """Return the screen of a call with these bugs, and perhaps others."""
        known = self.screens.get(target)
        if known is None or any(bug.name not in known.alone[-1] for (bug,) in bugs):
            known = self.screens[target] = Screen(self.trials, target, bugs, self.start)
        return known

    def _confirmed(self, target: Key, suspects: Sequence[Bugs]) -> list[Bugs]:
        """Return the suspects that explain all of a call's logits, and each bug of which does."""
        bugs = list({bug.name: (bug,) for suspect in suspects for bug in suspect}.values())
        alone = self._effects_on(target, bugs)
        together = self._effects_on(target, [one for one in suspects if len(one) > 1])
        effects = {tuple(bug.name for bug in one): effect for one, effect in alone + together}
        return [
            suspect
            for suspect in suspects
            if effects[tuple(bug.name for bug in suspect)].fits
            and all(effects[bug.name,].changes for bug in suspect)
        ]

    def _effects_on(self, target: Key, suspects: Sequence[Bugs]) -> list[tuple[Bugs, Effect]]:
        """Return the suspects with their effect on one call's logits."""
        steps = len(suspects) * len(self.trials.stages)
        advance = self.start("bugs that fit, all tokens", steps)
        found: list[Effect] = []
        for at in range(0, len(suspects), AT_ONCE):
            found += self.trials.effects_on(target, suspects[at : at + AT_ONCE], advance)
        return list(zip(suspects, found, strict=True))

    def _effects(self, suspects: Sequence[Bugs]) -> list[dict[Key, Effect]]:
        """Return the suspects' effects on all calls."""
        steps = len(suspects) * len(self.trials.stages)
        advance = self.start("bugs that fit, all calls", steps)
        found: list[dict[Key, Effect]] = []
        for at in range(0, len(suspects), AT_ONCE):
            found += self.trials.effects(suspects[at : at + AT_ONCE], advance)
        return found
