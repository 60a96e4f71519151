"""The tests that a backend can be put to: those of its methods and dtypes, inside its limits."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from reference_np.backend import dtypes_of
from reference_np.limits import Limits, limits_of

from .strategies import FREE_MASKS


def decoding_sides(limits: Limits) -> tuple[bool, ...]:
    """Return the sides, True for the left, on which prompts may be padded before decoding.

    After padding on the right, a new token's position is not its column: it must be given.
    """
    sides = limits.padding_sides
    return sides if limits.positions == "any" else tuple(side for side in sides if side)


def _decode(limits: Limits) -> str:
    return "" if limits.cache in ("value", "in place") else "cache"


def _padding(limits: Limits, sides: tuple[bool, ...]) -> str:
    return "" if sides else "batch" if limits.batch == 1 else "masks"


def _padded_decoding(limits: Limits) -> str:
    sides = decoding_sides(limits)
    unplaced = "positions" if limits.padding_sides and not sides else ""
    return _decode(limits) or unplaced or _padding(limits, sides)


# Test -> a function from limits to the name of the one that leaves no example of the test.
EXCLUDED: Mapping[str, Callable[[Limits], str]] = {
    "test_padding": lambda limits: _padding(limits, limits.padding_sides),
    "test_packing": lambda limits: "" if limits.masks in FREE_MASKS else "masks",
    "test_chunked_decoding": _decode,
    "test_long_decoding": _decode,
    "test_chunked_trace": _decode,
    "test_padded_decoding": _padded_decoding,
    "test_reused_cache": lambda limits: "" if limits.cache == "value" else "cache",
}


def excluded_by(test: str, backend: Any) -> str:
    """Return ``limit = value`` for the declared limit that leaves no example of a test; or ""."""
    limits = limits_of(backend)
    name = EXCLUDED[test](limits) if test in EXCLUDED else ""
    return f"{name} = {getattr(limits, name)}" if name else ""


def lacking(backend: Any, method: str, dtype: str | None) -> str:
    """Return the method or precision that a test needs and the backend lacks; "" if none."""
    if not callable(getattr(backend, method, None)):
        return method
    return "" if dtype is None or dtype in dtypes_of(backend) else dtype


def count_tests(modules: Iterable[ModuleType], backend: Any) -> int:
    """Return the number of some modules' tests that run on a backend on drawn examples."""
    return sum(
        is_drawn(vars(module)[name])
        and not lacking(backend, method, dtype)
        and not excluded_by(name, backend)
        for module in modules
        for name, method, _, dtype in _parametrized(module)
    )


def is_drawn(test: Callable) -> bool:
    """Return whether a test draws its examples; one of fixed examples has as many as it has."""
    return hasattr(test, "hypothesis")


def check_ids(module: ModuleType) -> Iterator[str]:
    """Yield the id of every test of a module without its backend, as test_logits_in[float32]."""
    for name, _, value, _ in _parametrized(module):
        yield name if value is None else f"{name}[{value}]"


def _parametrized(module: ModuleType) -> Iterator[tuple[str, str, Any, str | None]]:
    """Yield the name, the needed method, the parameter and the dtype of every test of a module."""
    for name, function in vars(module).items():
        marks = getattr(function, "pytestmark", []) if name.startswith("test_") else []
        needs = [mark.args[0] for mark in marks if mark.name == "needs"]
        parameters = [mark.args for mark in marks if mark.name == "parametrize"]
        for method in needs:
            values = parameters[0][1] if parameters else [None]
            of_dtype = bool(parameters) and parameters[0][0] == "dtype"
            for value in values:
                yield name, method, value, value if of_dtype else None
