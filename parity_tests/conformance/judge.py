"""Comparison of a backend's outputs with the oracle's, and a record of the errors.

An error's share is ``error / tolerance``: at most 1 passes; bounds.py has the tolerances.
"""

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from hypothesis import reject

from reference_np.limits import limits_of
from reference_np.refusals import is_own_refusal
from reference_np.tolerances import FLOAT64_TOLERANCE

from . import drawn
from .bounds import Bounds, Outputs, Scenario, resembling
from .calls import Calls, ParityError, WrongKindError, as_array, last_call, unfit
from .shrinking import Shrinking

__all__ = ["JUDGE", "Entry", "Judge", "Outputs", "Scenario"]

ANGLES = "rotary angles multiplied in float32"  # the documented difference
COUNTERS = ("not_covered", "by_limit", "documented")


@dataclass
class Entry:
    """The result of one test on one backend."""

    dtype: str = ""  # the precision of the parameters
    covered: int = 0  # examples that were compared
    share: float = 0.0  # the largest error / tolerance
    name: str = ""  # of the output with that error
    not_covered: Counter[str] = field(default_factory=Counter)  # examples, by reason
    by_limit: Counter[str] = field(default_factory=Counter)  # tests outside a declared limit
    # Outputs by the documented difference that explains their error, and the largest error /
    # tolerance without it.
    documented: Counter[str] = field(default_factory=Counter)
    largest_documented: float = 0.0


@dataclass
class Judge:
    """The record of a run, and the comparison of one backend's outputs with the oracle's."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)  # by (test, backend)
    current: tuple[str, str] = ("", "")  # the running test and its backend
    shrinking: Shrinking = field(default_factory=Shrinking)  # of the running test
    # The sentence on what the backend wrote to in the running test, of what was not its own. Such
    # a test fails at its end: first its values are judged in every example.
    overwritten: str = ""
    # The largest error of the running test, and what names the known bugs that it equals: the
    # smallest example may err by too little above its rounding to be told from other bugs.
    largest: tuple[float, Callable[[], list[str]]] = (0.0, list)
    only_record: bool = False  # for mutants, which are to fail: record their errors and go on

    def begin(self, test: str, backend: str) -> Entry:
        """Record from now on for this test and backend; plugins/parity_report.py calls it."""
        self.current, self.shrinking, self.overwritten = (test, backend), Shrinking(), ""
        self.largest = (0.0, list)
        drawn.last_example.clear()  # of the test before: not every test draws its examples
        return self.entry

    @property
    def entry(self) -> Entry:
        """The entry of the running test and its backend."""
        return self.entries.setdefault(self.current, Entry())

    def records(self) -> list[tuple[tuple[str, str], dict[str, Any]]]:
        """Return the entries as built-in types, to be sent to another process."""
        return [
            (key, vars(entry) | {name: dict(getattr(entry, name)) for name in COUNTERS})
            for key, entry in self.entries.items()
        ]

    def add(self, records: Iterable[tuple[tuple[str, str], dict[str, Any]]]) -> None:
        """Add the ``records()`` of another process, which ran other tests."""
        for key, fields in records:
            counted = {name: Counter(fields[name]) for name in COUNTERS}
            self.entries[key] = Entry(**fields | counted)
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
        """Run a scenario on the backend; ParityError where an output exceeds its tolerance.

        dtype      the precision of the backend's parameters.
        run        a function from an implementation to its outputs by name.
        exact      the oracle's outputs in float64.
        tolerance  the bound of an error in float64.
        rms_only   in low precision, compare the root mean square alone, where single elements
                   have no useful bound.
        """
        example = drawn.format_numbers(drawn.last_example)
        if self.shrinking.is_over(example):
            reject()
        self.shrinking.begun(example)
        try:
            self._compare(backend, dtype, run, exact, tolerance, rms_only)
        except Exception as error:
            self.shrinking.failed()
            if isinstance(error, WrongKindError):
                self.shrinking.end()
            raise

    def _compare(
        self,
        backend: Any,
        dtype: str,
        run: Scenario,
        exact: Outputs,
        tolerance: float,
        rms_only: bool,
    ) -> None:
        last_call.clear()
        self.entry.dtype = dtype
        calls = Calls(backend)
        try:
            with np.errstate(all="ignore" if self.only_record else None):  # mutants may overflow
                actual = run(backend if self.only_record else calls)
        except NotImplementedError as error:
            if not is_own_refusal(backend, error):
                raise ParityError(_from_a_library(backend, error)) from error
            self.entry.not_covered[str(error) or "not offered"] += 1
            return
        self.entry.covered += 1
        missing = [name for name in exact if name not in actual]
        if missing:
            raise ParityError(f"missing: {', '.join(missing)}")
        bounds = Bounds(dtype, run, tolerance, rms_only, dtype in limits_of(backend).float32_angles)
        for name, value in exact.items():
            found = actual[name] if self.only_record else as_array(name, actual[name])
            if why := unfit(name, np.asarray(found), value.shape):
                self.record(name, math.inf, ParityError(why))
                continue
            for judged, share, strict, detail in bounds.shares(name, found, value):
                if share <= 1 < strict:
                    self.entry.documented[ANGLES] += 1
                    self.entry.largest_documented = max(self.entry.largest_documented, strict)
                numbers = drawn.format_numbers(drawn.last_example)
                failure = ParityError(
                    f"{judged}: {share:.3g} times its tolerance in {dtype}",
                    [detail, *([f"drawn      {numbers}"] if numbers else [])],
                    partial(resembling, run, name, found, value, dtype),
                )
                self.record(judged, share, failure)
        self.overwritten = self.overwritten or calls.overwritten

    def record(self, name: str, share: float, failure: ParityError | None = None) -> None:
        """Record the error / tolerance of one output; raise the failure if it is above 1."""
        if not share <= self.entry.share:
            self.entry.share, self.entry.name = share, name
        if self.only_record or share <= 1:
            return
        failure = failure or ParityError(f"{name}: {share:.3g} times its tolerance")
        if self.largest[0] < share < math.inf:
            self.largest = share, failure.resembling
        if share != self.largest[0]:  # else it is the largest itself
            failure.resembling = partial(_first_named, failure.resembling, self.largest[1])
        raise failure  # at one place: Hypothesis tells failures apart by it


def _first_named(own: Callable[[], list[str]], largest: Callable[[], list[str]]) -> list[str]:
    """Return the known bugs that a failure equals; of none, the nearest to the largest failure."""
    return own() or [f"{bug} (in a larger example)" for bug in largest()[:1]]


def _from_a_library(backend: Any, error: NotImplementedError) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    why = " ".join(str(error).split())
    return (
        f"NotImplementedError from {at.filename}:{at.lineno} ({why}), outside the backend's own "
        f"file: a failure; raise it in {type(backend).__module__} for what you do not offer"
    )


JUDGE = Judge()
