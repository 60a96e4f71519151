"""What Hypothesis draws: the same on every machine, and told by the numbers that rebuild it."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.control import current_build_context
from hypothesis.internal.conjecture import providers

# For ``find``: the first example that has a property, the same everywhere.
SEARCH = settings(
    max_examples=500,
    phases=[Phase.generate],
    database=None,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# The labelled values of the outermost strategy that is being drawn, if one is.
_numbers: list[dict[str, Any]] = []
# Those of the example that was drawn last, for the line that tells of a failure.
latest: dict[str, Any] = {}
_example: Any = None  # Hypothesis's own context of it


def ignore_constants() -> None:
    """Keep the examples apart from the constants of whatever modules are imported.

    Hypothesis draws some of its numbers and texts from the source files of local modules that are
    loaded, in derandomised profiles as well: the examples of a test would depend on which tests
    run beside it, and on every edit of a constant anywhere.
    """
    assert callable(providers._get_local_constants)  # or the patch would be of nothing
    nothing = providers.Constants()
    providers._get_local_constants = lambda: nothing


class Draw:
    """A ``draw`` that keeps every labelled value in ``numbers``."""

    def __init__(self, draw: st.DrawFn, numbers: dict[str, Any]) -> None:
        self._draw, self.numbers = draw, numbers

    def __call__(self, strategy: st.SearchStrategy[Any], label: str | None = None) -> Any:
        """Draw a value, and keep it under its label."""
        value = self._draw(strategy, label=label)
        if label:
            keep(self.numbers, label, value)
        return value


def keep(numbers: dict[str, Any], label: str, value: Any) -> None:
    """Keep a value under its label, or under ``label#2`` and so on."""
    same = sum(name.split("#")[0] == label for name in numbers)
    numbers[f"{label}#{same + 1}" if same else label] = value


def composite(function: Callable[..., Any]) -> Callable[..., st.SearchStrategy[Any]]:
    """Make a composite strategy whose ``draw`` is a Draw; nested ones share their numbers.

    ``latest`` has the numbers of all strategies that one example draws.
    """

    @st.composite
    @functools.wraps(function)
    def recorded(draw: st.DrawFn, *args: Any, **kwargs: Any) -> Any:
        global _example
        is_outermost = not _numbers
        if is_outermost:
            _numbers.append({})
            if _example is not (_example := current_build_context()):
                latest.clear()
        try:
            return function(Draw(draw, _numbers[0]), *args, **kwargs)
        finally:
            if is_outermost:
                for label, value in _numbers.pop().items():
                    keep(latest, label.split("#")[0], value)

    return recorded


class Told(tuple[Any, ...]):
    """A tuple of large values that prints as the numbers that rebuild it."""

    numbers: Mapping[str, Any]

    def __repr__(self) -> str:
        """List the numbers."""
        return f"({listed(self.numbers)})"


def told(values: Iterable[Any], numbers: Mapping[str, Any]) -> Told:
    """Return the values as a tuple that prints as ``numbers``."""
    made = Told(values)
    made.numbers = numbers
    return made


def listed(numbers: Mapping[str, Any]) -> str:
    """List labelled values in the order in which they were drawn."""
    return ", ".join(f"{label}={value!r}" for label, value in numbers.items())


def described(case: Any) -> str:
    """Describe a case by the few numbers that rebuild it, or by its config where none are kept."""
    made_from = listed(case.numbers) if case.numbers else f"config={case.config}"
    return f"{type(case).__name__}({made_from})"
