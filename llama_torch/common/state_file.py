"""Write and read the program's own state: JSON objects that carry a checksum of their content.

The checksum finds accidents. It is no proof of where a file comes from, so that every reader checks
types, ranges and what the file describes as well. A file without one is an earlier version's.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_common.errors import InputError
from llama_common.files import parse_json, read_json_text, write_text

CHECKSUM = "sha256"  # the key; of the rest of the object, with its keys sorted

MOST = (1 << 63) - 1  # of a count: what torch and NumPy hold


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object in its shortest spelling, keys sorted, in hex."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the checksum of its content added as a last key."""
    return {**content, CHECKSUM: checksum(content)}


def verified(found: Mapping[str, Any], source: str, remedy: str) -> tuple[dict[str, Any], bool]:
    """Return an object without its checksum, and whether it had one.

    Raises InputError that begins with ``source`` and ends with ``remedy`` for another checksum.
    """
    content = {key: value for key, value in found.items() if key != CHECKSUM}
    try:
        is_right = CHECKSUM not in found or found[CHECKSUM] == checksum(content)
    except RecursionError:  # lists in lists that were just read, but cannot be written
        is_right = False
    if not is_right:
        raise InputError(
            f"{source}: is not as it was written, since its {CHECKSUM} is another; {remedy}"
        )
    return content, CHECKSUM in found


def write_state(path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """Write an object and its checksum atomically as JSON."""
    write_text(path, json.dumps(with_checksum(content), indent=indent) + "\n")


def read_state(path: Path, remedy: str) -> tuple[dict[str, Any], bool]:
    """Return the object of a file that ``write_state`` wrote, and whether it has a checksum.

    Raises InputError for a file that cannot be read, is no JSON object, names a key twice, holds a
    number that is not finite, or differs from its checksum; the last with ``remedy``.
    """
    hooks = {"object_pairs_hook": _object, "parse_float": _finite, "parse_constant": _finite}
    found = parse_json(read_json_text(path), str(path), remedy, **hooks)
    return verified(found, str(path), remedy)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{abridged(twice)} stands there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{abridged(text)} is not finite")
    return value


def require_count(name: str, value: Any, low: int = 0, high: int = MOST) -> int:
    """Return a whole number from ``low`` to ``high``; raise ValueError naming it otherwise."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {abridged(value)}")
    return value


def require_text(name: str, value: Any) -> str:
    """Return a text; raise ValueError naming it for another value."""
    if type(value) is not str:
        raise ValueError(f"{name} is {abridged(value)}")
    return value


def abridged(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > MOST:
        return "a number of more than 64 bits"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
