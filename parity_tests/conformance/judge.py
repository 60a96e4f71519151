"""Comparison of a backend's outputs with the oracle's, and a record of the errors.

An error's share is ``error / tolerance``: at most 1 passes. In float64 the error is the largest
difference over the largest value, and the tolerance FLOAT64_TOLERANCE. In a lower precision the
same scenario runs on a baseline, plain NumPy in that precision, and its error sets the tolerance
(reference_np/tolerances.py, tier 3).
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
from .oracle import Baseline
from .strategies import Array

Outputs = Mapping[str, Array]
Scenario = Callable[[Any], Outputs]


@dataclass
class Entry:
    """The result of one test on one backend."""

    covered: int = 0  # examples that were compared
    share: float = 0.0  # the largest error / tolerance
    name: str = ""  # of the output with that error
    not_covered: Counter[str] = field(default_factory=Counter)  # examples, by reason


@dataclass
class Judge:
    """The record of a run, and the comparison of one backend's outputs with the oracle's."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)  # by (test, backend)
    current: tuple[str, str] = ("", "")  # the running test and its backend
    only_record: bool = False  # for mutants, which are to fail: record their errors and go on

    def begin(self, test: str, backend: str) -> Entry:
        """Record from now on for this test and backend; support/parity_report.py calls it."""
        self.current = test, backend
        return self.entry

    @property
    def entry(self) -> Entry:
        """The entry of the running test and its backend."""
        return self.entries.setdefault(self.current, Entry())

    def records(self) -> list[tuple[tuple[str, str], dict[str, Any]]]:
        """Return the entries as built-in types, to be sent to another process."""
        return [
            (key, vars(entry) | {"not_covered": dict(entry.not_covered)})
            for key, entry in self.entries.items()
        ]

    def add(self, records: Iterable[tuple[tuple[str, str], dict[str, Any]]]) -> None:
        """Add the ``records()`` of another process, which ran other tests."""
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
        tolerance: float = FLOAT64_TOLERANCE,
        rms_only: bool = False,
    ) -> None:
        """Run a scenario on the backend; AssertionError where an output exceeds its tolerance.

        dtype      the precision of the backend's parameters.
        run        a function from an implementation to its outputs by name.
        exact      the oracle's outputs in float64.
        tolerance  the bound of an error in float64.
        rms_only   in low precision, compare the root mean square alone, where single elements
                   have no useful bound.
        """
        try:
            with np.errstate(all="ignore" if self.only_record else None):  # mutants may overflow
                actual = run(backend)
        except NotImplementedError as error:
            self.entry.not_covered[str(error) or "not offered"] += 1
            return
        self.entry.covered += 1
        baseline = {} if dtype == "float64" else run(Baseline(dtype))
        missing = [name for name in exact if name not in actual]
        assert not missing, f"missing: {', '.join(missing)}"
        for name, value in exact.items():
            if dtype == "float64":
                error_f64 = max_relative_error(actual[name], value)
                self.record(name, error_f64 / tolerance, dtype)
                continue
            error, baseline_error = errors(actual[name], value), errors(baseline[name], value)
            # A baseline that overflowed would excuse any error.
            assert all(map(math.isfinite, baseline_error)), f"{name}: the baseline is not finite"
            bound = composed_bound(baseline_error, dtype)
            if rms_only:
                share = error.rms / bound.rms if error.rms < math.inf else math.inf
                self.record(name, share, dtype)
                continue
            self.record(name, error.share(bound), dtype)
            if name == "logits":
                kl = float(kl_per_token(actual[name], value).max())
                baseline_kl = float(kl_per_token(baseline[name], value).max())
                limit = kl_bound(baseline_kl, float(np.abs(value).max()), dtype)
                self.record("logits' KL", kl / limit, dtype)

    def record(self, name: str, share: float, dtype: str) -> None:
        """Record the error / tolerance of one output; AssertionError if it is above 1."""
        if not share <= self.entry.share:
            self.entry.share, self.entry.name = share, name
        if not self.only_record:
            case = drawn.format_numbers(drawn.last_example)
            assert share <= 1, f"{name}: {share:.3g} times its tolerance in {dtype}; {case}"


JUDGE = Judge()
