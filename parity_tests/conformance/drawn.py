"""Hypothesis draws that are equal on every machine and print as the labelled numbers drawn."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.control import current_build_context
from hypothesis.internal.conjecture import providers

# For ``find``: the first example with a property, equal on every machine.
SEARCH = settings(
    max_examples=500,
    phases=[Phase.generate],
    database=None,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# While a strategy is being drawn: one dict, the labelled values of the outermost strategy.
_outermost: list[dict[str, Any]] = []
# The labelled values of the example drawn last, for the message of a failure.
last_example: dict[str, Any] = {}
_example: Any = None  # Hypothesis's context of that example


def ignore_constants() -> None:
    """Make the examples independent of the constants in imported modules.

    Hypothesis draws some of its numbers and texts from the source files of imported local modules,
    in derandomised profiles as well: the examples of a test would depend on the tests that run in
    the same process, and on every edit of a constant anywhere.
    """
    assert callable(providers._get_local_constants)  # or the patch would have no effect
    no_constants = providers.Constants()
    providers._get_local_constants = lambda: no_constants


class Draw:
    """A ``draw`` that records every labelled value in ``numbers``."""

    def __init__(self, draw: st.DrawFn, numbers: dict[str, Any]) -> None:
        self._draw, self.numbers = draw, numbers

    def __call__(self, strategy: st.SearchStrategy[Any], label: str | None = None) -> Any:
        """Draw a value, and record it under its label."""
        value = self._draw(strategy, label=label)
        if label:
            record(self.numbers, label, value)
        return value


def record(numbers: dict[str, Any], label: str, value: Any) -> None:
    """Record a value under its label, a second one under ``label#2`` and so on."""
    same = sum(name.split("#")[0] == label for name in numbers)
    numbers[f"{label}#{same + 1}" if same else label] = value


def composite(function: Callable[..., Any]) -> Callable[..., st.SearchStrategy[Any]]:
    """Return a composite strategy whose ``draw`` is a Draw; nested strategies share ``numbers``.

    The labelled values of all strategies of one example are added to ``last_example``.
    """

    @st.composite
    @functools.wraps(function)
    def recorded(draw: st.DrawFn, *args: Any, **kwargs: Any) -> Any:
        global _example
        is_outermost = not _outermost
        if is_outermost:
            _outermost.append({})
            if _example is not (_example := current_build_context()):
                last_example.clear()
        try:
            return function(Draw(draw, _outermost[0]), *args, **kwargs)
        finally:
            if is_outermost:
                for label, value in _outermost.pop().items():
                    record(last_example, label.split("#")[0], value)

    return recorded


class LabelledTuple(tuple[Any, ...]):
    """A tuple of large values, printed as the labelled numbers it was made from."""

    numbers: Mapping[str, Any]

    def __repr__(self) -> str:
        """Return the numbers in place of the values."""
        return f"({format_numbers(self.numbers)})"


def labelled(values: Iterable[Any], numbers: Mapping[str, Any]) -> LabelledTuple:
    """Return the values as a tuple that is printed as ``numbers``."""
    result = LabelledTuple(values)
    result.numbers = numbers
    return result


def format_numbers(numbers: Mapping[str, Any]) -> str:
    """Return ``label=value, ...`` in the order in which the values were drawn."""
    return ", ".join(f"{label}={value!r}" for label, value in numbers.items())


def describe_case(case: Any) -> str:
    """Return a case's type and the numbers it was made from, or its config if it has none."""
    text = format_numbers(case.numbers) if case.numbers else f"config={case.config}"
    return f"{type(case).__name__}({text})"
