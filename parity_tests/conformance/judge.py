"""What the conformance tests measure: every error as a share of its tolerance, and a record.

One tolerance module judges every backend. In float64 an error is the largest difference over
the largest value, against FLOAT64_TOLERANCE; below that the same scenario is run on a plain NumPy
implementation in the same precision, and its error sets the bound.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reference_np.tolerances import (
    FLOAT64_TOLERANCE,
    composed_bound,
    errors,
    kl_bound,
    kl_per_token,
    max_relative_error,
)

from . import drawn
from .oracle import Plain
from .strategies import Array

Outputs = Mapping[str, Array]
Scenario = Callable[[Any], Outputs]


@dataclass
class Entry:
    """What one test found out about one backend."""

    covered: int = 0
    share: float = 0.0  # the largest error as a share of its tolerance
    name: str = ""  # of the output that has it
    not_covered: Counter[str] = field(default_factory=Counter)


@dataclass
class Judge:
    """The record of a run: (test, backend) -> Entry; parity_report.py says which test runs."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    current: tuple[str, str] = ("", "")
    only_record: bool = False  # a mutant is supposed to fail: measure it and go on

    @property
    def entry(self) -> Entry:
        return self.entries.setdefault(self.current, Entry())

    def records(self) -> list[tuple[tuple[str, str], dict[str, Any]]]:
        """Return the entries as built-in types, for another process."""
        return [
            (key, vars(entry) | {"not_covered": dict(entry.not_covered)})
            for key, entry in self.entries.items()
        ]

    def add(self, records: Iterable[tuple[tuple[str, str], dict[str, Any]]]) -> None:
        """Take over the entries of another process, which ran other tests than this one."""
        for key, fields in records:
            counted = Counter(fields["not_covered"])
            self.entries[key] = Entry(**fields | {"not_covered": counted})
        self.entries = dict(sorted(self.entries.items()))

    def compare(
        self,
        backend: Any,
        dtype: str,
        run: Scenario,
        exact: Outputs,
        *,
        logic: float = FLOAT64_TOLERANCE,
        average: bool = False,
    ) -> None:
        """Run a scenario on the backend; fail where an output exceeds its bound.

        ``average`` judges low precision by the root mean square alone, where single elements
        have no useful bound.
        """
        try:
            with np.errstate(all="ignore" if self.only_record else None):  # bugs may overflow
                actual = run(backend)
        except NotImplementedError as error:
            self.entry.not_covered[str(error) or "not offered"] += 1
            return
        self.entry.covered += 1
        plain = {} if dtype == "float64" else run(Plain(dtype))
        missing = [name for name in exact if name not in actual]
        assert not missing, f"missing: {', '.join(missing)}"
        for name, value in exact.items():
            if dtype == "float64":
                self.note(name, max_relative_error(actual[name], value) / logic, dtype)
                continue
            error, floor = errors(actual[name], value), errors(plain[name], value)
            # A baseline that overflowed would excuse anything.
            assert all(map(math.isfinite, floor)), f"{name}: the plain baseline is not finite"
            bound = composed_bound(floor, dtype)
            if average:
                share = error.rms / bound.rms if error.rms < math.inf else math.inf
                self.note(name, share, dtype)
                continue
            self.note(name, error.share(bound), dtype)
            if name == "logits":
                kl = float(kl_per_token(actual[name], value).max())
                honest = float(kl_per_token(plain[name], value).max())
                limit = kl_bound(honest, float(np.abs(value).max()), dtype)
                self.note("logits' KL", kl / limit, dtype)

    def note(self, name: str, share: float, dtype: str) -> None:
        """Record one error as a share of its tolerance; fail if it is more."""
        if not share <= self.entry.share:
            self.entry.share, self.entry.name = share, name
        if not self.only_record:
            case = drawn.listed(drawn.latest)
            assert share <= 1, f"{name}: {share:.3g} times its tolerance in {dtype}; {case}"


JUDGE = Judge()
