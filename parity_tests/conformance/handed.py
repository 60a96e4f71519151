"""What a backend is handed: copies of the arrays, and which of them it has written to.

The same arrays go to the oracle, to the baseline that sets the tolerance and to the search for a
known bug. One that a backend overwrote would spoil those, and excuse its error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from reference_np.ops import Array

# How every sentence on a method ends that writes to an array: one it was given, or one it returned.
OVERWRITES = ("copy them", "return an array of its own")


class Handed:
    """Copies of the arrays in ``given``, by name: arrays, or lists and tuples of them."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.copies = {name: _copied(value) for name, value in given.items()}
        self._names = list(given)
        # Of the arrays, as the backend may change lists.
        of_copies = [copy for _, copy in _arrays(self.copies)]
        self._pairs = [
            (name, array, copy)
            for (name, array), copy in zip(_arrays(given), of_copies, strict=True)
        ]

    def changed(self) -> list[str]:
        """Return the names of what the backend has changed."""
        written = [name for name, array, copy in self._pairs if not _is_same(array, copy)]
        absent = [name for name in self._names if name not in self.copies]
        more = [name for name in self.copies if name not in self._names]
        return list(dict.fromkeys([*written, *absent, *more]))


def describe_change(method: str, names: list[str]) -> str:
    """Return the sentence on a method that changes what it is given."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{method} changes the arrays that it is given ({names[0]}{more}): {OVERWRITES[0]}"


def _copied(value: Any) -> Any:
    """Return an array's copy, and a list's or a tuple's of copies; anything else as it is."""
    if isinstance(value, np.ndarray):
        return np.array(value)
    if isinstance(value, list):
        return [_copied(part) for part in value]
    if isinstance(value, tuple):
        return type(value)(*map(_copied, value))  # a Batch
    return value


def _arrays(given: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """Yield every array with its name: tokens, rows[0], batches[0].tokens."""
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            yield name, value
        elif isinstance(value, list):
            yield from _arrays({f"{name}[{i}]": part for i, part in enumerate(value)})
        elif isinstance(value, tuple):
            yield from _arrays({f"{name}.{key}": part for key, part in value._asdict().items()})


def _is_same(one: Array, other: Array) -> bool:
    """Return whether two arrays have the same form and bits."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and one.tobytes() == other.tobytes()
