"""The tables after a run: each backend's largest errors, and the tests that kill each mutant."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from reference_np.mutants import Mutant

from ..conformance.judge import Entry

Entries = Mapping[tuple[str, str], Entry]
GOAL = 10.0  # error / tolerance that every mutant should reach in at least one test

TRACES = ("trace", "chunked_trace")  # the tests of activations


def _by_test(entries: Entries, backend: str) -> dict[str, Entry]:
    return {test: entry for (test, name), entry in entries.items() if name == backend}


def _format(share: float) -> str:
    return f"{share:.2g}" if math.isfinite(share) else "not finite"


def backend_table(entries: Entries, in_full: bool) -> Iterator[str]:
    """Yield each backend's counts of examples and its largest error / tolerance.

    ``in_full`` adds a line for each test.
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
        if in_full:
            for name_of_test, entry in of_backend.items():
                yield (
                    f"    {name_of_test:<24} {entry.covered:>5} compared "
                    f"{entry.not_covered.total():>5} not covered   {_format(entry.share):>8}"
                )
        for reason, count in skipped.items():
            yield f"    not covered, {count} examples: {reason}"


def survivors(entries: Entries, mutants: Mapping[str, Mutant]) -> list[str]:
    """Return the mutants whose largest error is below GOAL tolerances in every test."""
    shares = {name: [e.share for e in _by_test(entries, name).values()] for name in mutants}
    return [name for name, found in shares.items() if not max(found, default=0.0) >= GOAL]


def mutation_table(entries: Entries, mutants: Mapping[str, Mutant], honest: str) -> Iterator[str]:
    """Yield each mutant's largest error / tolerance and its test, and the score.

    ``honest`` names the correct implementation whose error / tolerance in the same test is
    printed beside it. ``outputs alone`` is the largest margin without the tests of activations,
    which few implementations offer.
    """
    honest_entries = _by_test(entries, honest)
    yield f"{'mutant':<30} {'killed by':<18} {'margin':>8} {'honest':>8} {'outputs alone':>14}"
    for name, mutant in mutants.items():
        of_mutant = _by_test(entries, name)
        if not any(entry.covered for entry in of_mutant.values()):
            yield f"{name:<30} was not run"
            continue
        test = max(of_mutant, key=lambda test: of_mutant[test].share)
        share = of_mutant[test].share
        outputs = [e.share for t, e in of_mutant.items() if t not in TRACES]
        without_trace = max(outputs, default=0.0)
        honest_share = honest_entries[test].share if test in honest_entries else 0.0
        verdict = test if share > 1 else ("DEAD: changes nothing" if share == 0 else "SURVIVES")
        weak = "  under the goal" if 1 < share < GOAL else ""
        yield (
            f"{name:<30} {verdict:<18} {share:>8.1e} {honest_share:>8.1e}"
            f" {without_trace:>14.1e}{weak}  {mutant.sentence}"
        )
    alive = survivors(entries, mutants)
    killed = len(mutants) - len(alive)
    yield f"{killed} of {len(mutants)} mutants killed by {GOAL:.0f} times a tolerance or more" + (
        f"; not: {', '.join(alive)}" if alive else ""
    )
