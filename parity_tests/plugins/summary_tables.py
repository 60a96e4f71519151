"""The tables after a run: each backend's largest errors, and the tests that kill each mutant."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from reference_np.limits import Limits
from reference_np.mutants import Mutant

from ..conformance.judge import Entry

Entries = Mapping[tuple[str, str], Entry]
GOAL = 10.0  # error / tolerance that every mutant should reach in at least one test

LEAST_COMPARED = 10  # examples; fewer are no proof

KEYS = ("key_of_config_json", "unsupported_key")  # the tests of keys, each a parameter
TRACES = ("trace", "chunked_trace")  # the tests of activations


def _by_test(entries: Entries, backend: str) -> dict[str, Entry]:
    return {test: entry for (test, name), entry in entries.items() if name == backend}


def _format(share: float) -> str:
    return f"{share:.2g}" if math.isfinite(share) else "not finite"


def backend_table(entries: Entries, limits: Mapping[str, Limits]) -> Iterator[str]:
    """Yield each backend's counts of examples and its largest error / tolerance.

    Those of ``limits``, which were asked for by name, have a line for each test and each limit.
    """
    names = list(dict.fromkeys(name for _, name in entries))
    yield "examples compared, not covered, and the largest error as a share of its tolerance:"
    for name in names:
        of_backend = _by_test(entries, name)
        test, largest = max(of_backend.items(), key=lambda item: item[1].share)
        covered = sum(entry.covered for entry in of_backend.values())
        skipped = sum((entry.not_covered for entry in of_backend.values()), Counter[str]())
        yield (
            f"  {name}: {covered} compared, {skipped.total()} not covered; "
            f"{_format(largest.share)} in {test} ({largest.name or 'exact'})"
        )
        if name in limits:
            yield from _lines(of_backend)
        yield from _documented(of_backend)
        for reason, count in skipped.items():
            yield f"    not covered, {count} examples: {reason}"
        yield from _by_limit(of_backend, limits.get(name))


def _lines(of_backend: Mapping[str, Entry]) -> Iterator[str]:
    """Yield a line for each test; all keys of one test have one."""
    together: dict[str, list[Entry]] = {}
    for test, entry in of_backend.items():
        together.setdefault(_line(test), []).append(entry)
    for test, entries in together.items():
        yield (
            f"    {test:<24} {sum(entry.covered for entry in entries):>5} compared "
            f"{sum(entry.not_covered.total() for entry in entries):>5} not covered   "
            f"{_format(max(entry.share for entry in entries)):>8}"
        )


def _line(test: str) -> str:
    return next((name for name in KEYS if test.startswith(f"{name} ")), test)


def _documented(of_backend: Mapping[str, Entry]) -> Iterator[str]:
    """Yield the counts of errors that a declared difference explains."""
    found = sum((entry.documented for entry in of_backend.values()), Counter[str]())
    largest = max((entry.largest_documented for entry in of_backend.values()), default=0.0)
    for reason, count in found.items():
        yield (
            f"    documented difference, {count} outputs: {reason}; without that bound, up to "
            f"{_format(largest)} times a tolerance"
        )


def _by_limit(of_backend: Mapping[str, Entry], limits: Limits | None) -> Iterator[str]:
    """Yield the declared limits, each with the tests of which it leaves no example."""
    tests: dict[str, list[str]] = {}
    for name, value in limits.declared().items() if limits else ():
        tests[f"{name} = {value}"] = []
    for test, entry in of_backend.items():
        for limit in entry.by_limit:
            tests.setdefault(limit, []).append(_line(test))
    if tests:
        yield "    not covered, by limit:"
    for limit, excluded in tests.items():
        yield f"      {limit:<32} {', '.join(dict.fromkeys(excluded))}".rstrip()


def below_the_floor(entries: Entries, names: Iterable[str]) -> list[str]:
    """Return a line for each backend that was compared on too few examples, with the reasons.

    The floor is LEAST_COMPARED, and a tenth of the examples that were drawn.
    """
    lines = []
    for name in names:
        of_backend = _by_test(entries, name).values()
        covered = sum(entry.covered for entry in of_backend)
        skipped = sum((entry.not_covered for entry in of_backend), Counter[str]())
        drawn = covered + skipped.total()
        floor = max(LEAST_COMPARED, drawn / 10)
        if of_backend and covered < floor:
            reasons = "; ".join(f"{reason} ({n})" for reason, n in skipped.most_common(3))
            lines.append(
                f"FAILED {name}: {covered} of {drawn} examples compared, the least is "
                f"{math.ceil(floor)}; not covered: {reasons}. Declare what it supports in an "
                "attribute limits (reference_np/limits.py): the examples are drawn inside"
            )
    return lines


def survivors(entries: Entries, mutants: Mapping[str, Mutant]) -> list[str]:
    """Return the mutants whose largest error is below GOAL tolerances in every test."""
    shares = {name: [e.share for e in _by_test(entries, name).values()] for name in mutants}
    return [name for name, found in shares.items() if not max(found, default=0.0) >= GOAL]


def mutation_table(entries: Entries, mutants: Mapping[str, Mutant], honest: str) -> Iterator[str]:
    """Yield each mutant's largest error / tolerance and its test, and the score.

    ``honest`` names the correct implementation whose error / tolerance in the same test is
    printed beside it, where it ran in the same precision. ``outputs alone`` is the largest margin
    without the tests of activations, which few implementations offer.
    """
    honest_entries = _by_test(entries, honest)
    yield f"{'mutant':<38} {'killed by':<18} {'margin':>8} {'honest':>8} {'outputs alone':>14}"
    for name, mutant in mutants.items():
        of_mutant = _by_test(entries, name)
        if not any(entry.covered for entry in of_mutant.values()):
            yield f"{name:<38} was not run"
            continue
        test = max(of_mutant, key=lambda test: of_mutant[test].share)
        share = of_mutant[test].share
        outputs = [e.share for t, e in of_mutant.items() if t not in TRACES]
        without_trace = max(outputs, default=0.0)
        right = honest_entries.get(test)
        same = right is not None and right.dtype == of_mutant[test].dtype
        honest_share = f"{right.share:.1e}" if right and same else "-"
        verdict = test if share > 1 else ("DEAD: changes nothing" if share == 0 else "SURVIVES")
        weak = "  under the goal" if 1 < share < GOAL else ""
        yield (
            f"{name:<38} {verdict:<18} {share:>8.1e} {honest_share:>8}"
            f" {without_trace:>14.1e}{weak}  {mutant.sentence}"
        )
    alive = survivors(entries, mutants)
    killed = len(mutants) - len(alive)
    yield f"{killed} of {len(mutants)} mutants killed by {GOAL:.0f} times a tolerance or more" + (
        f"; not: {', '.join(alive)}" if alive else ""
    )
