"""The tables after a run: margins of each backend, and what killed each mutant."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from reference_np.mutants import Mutant

from ..conformance.judge import Entry

Entries = Mapping[tuple[str, str], Entry]
GOAL = 10.0  # how far over a float64 tolerance every mutant should be


def _of(entries: Entries, backend: str) -> dict[str, Entry]:
    return {test: entry for (test, name), entry in entries.items() if name == backend}


def _size(share: float) -> str:
    return f"{share:.2g}" if math.isfinite(share) else "not finite"


def backend_table(entries: Entries, in_full: bool) -> Iterator[str]:
    """Yield, for each backend, how much was covered and the error closest to its tolerance."""
    names = list(dict.fromkeys(name for _, name in entries))
    yield "examples compared, not covered, and the largest error as a share of its tolerance:"
    for name in names:
        mine = _of(entries, name)
        closest = max(mine, key=lambda test: mine[test].share)
        covered = sum(entry.covered for entry in mine.values())
        skipped = sum((entry.not_covered for entry in mine.values()), Counter[str]())
        yield (
            f"  {name}: {covered} compared, {skipped.total()} not covered; "
            f"{_size(mine[closest].share)} in {closest} ({mine[closest].name or 'exact'})"
        )
        if in_full:
            for test, entry in mine.items():
                yield (
                    f"    {test:<24} {entry.covered:>5} compared "
                    f"{entry.not_covered.total():>5} not covered   {_size(entry.share):>8}"
                )
        for reason, count in skipped.items():
            yield f"    not covered, {count} examples: {reason}"


def survivors(entries: Entries, mutants: Mapping[str, Mutant]) -> list[str]:
    """Return the mutants that no test killed by GOAL times its tolerance."""
    shares = {name: [e.share for e in _of(entries, name).values()] for name in mutants}
    return [name for name, found in shares.items() if not max(found, default=0.0) >= GOAL]


def mutation_table(entries: Entries, mutants: Mapping[str, Mutant], honest: str) -> Iterator[str]:
    """Yield the mutation score: each bug's margin over the tolerance, beside the honest error's.

    A margin of 1 is the tolerance itself. ``outputs alone`` is the largest margin without the
    trace, which few implementations offer.
    """
    mine = _of(entries, honest)
    yield f"{'mutant':<30} {'killed by':<18} {'margin':>8} {'honest':>8} {'outputs alone':>14}"
    for name, mutant in mutants.items():
        found = _of(entries, name)
        if not any(entry.covered for entry in found.values()):
            yield f"{name:<30} was not run"
            continue
        test = max(found, key=lambda test: found[test].share)
        share = found[test].share
        alone = max((e.share for t, e in found.items() if t != "trace"), default=0.0)
        theirs = mine[test].share if test in mine else 0.0
        verdict = test if share > 1 else ("DEAD: changes nothing" if share == 0 else "SURVIVES")
        weak = "  under the goal" if 1 < share < GOAL else ""
        yield (
            f"{name:<30} {verdict:<18} {share:>8.1e} {theirs:>8.1e}"
            f" {alone:>14.1e}{weak}  {mutant.sentence}"
        )
    alive = survivors(entries, mutants)
    killed = len(mutants) - len(alive)
    yield f"{killed} of {len(mutants)} mutants killed by {GOAL:.0f} times a tolerance or more" + (
        f"; not: {', '.join(alive)}" if alive else ""
    )
