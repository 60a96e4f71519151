"""Change the program's state files (run.json, index.json, ...), one value at a time."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama_common.errors import LONGEST, InputError
from llama_torch.common.state_file import CHECKSUM, with_checksum

Place = tuple[str | int, ...]  # the keys that lead to a value

# What a value is replaced by, as JSON spells it, or as it nearly does.
SPELLINGS = {
    "null": "null",
    "true": "true",
    "-1": "-1",
    "0": "0",
    "1": "1",
    "1.5": "1.5",
    "2^31": str(1 << 31),
    "2^63": str(1 << 63),
    "10^5000": "1" + "0" * 5000,
    "1e400": "1e400",
    "NaN": "NaN",
    "empty text": '""',
    "text": '"x"',
    "zero byte": '"\\u0000"',
    "half a character": '"\\ud800"',
    "path": '"../../../x"',
    "long text": '"' + "x" * 100_000 + '"',
    "list": "[]",
    "lists in lists": "[" * 900 + "]" * 900,
    "lists without end": "[" * 100_000,
    "object": "{}",
}
_HERE = "the value that is replaced"


class Mutation(NamedTuple):
    """A state file's text with one change, and the change in words."""

    name: str
    text: str


def read(path: Path) -> dict[str, Any]:
    """Return a state file's content without its checksum, as an earlier version wrote it."""
    found: dict[str, Any] = json.loads(path.read_text())
    found.pop(CHECKSUM, None)
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a state file whose checksum is that of its content."""
    path.write_text(json.dumps(with_checksum(content)))


def places(content: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the place of every value in an object, outer ones first."""
    if place:
        yield place
    entries = content.items() if isinstance(content, dict) else ()
    entries = enumerate(content) if isinstance(content, list) else entries
    for key, value in entries:
        yield from places(value, (*place, key))


def mutate(content: dict[str, Any], place: Place, change: str, renew: bool = True) -> Mutation:
    """Replace the value at a place by a spelling, or remove it, or write its key twice.

    The checksum is that of the content before; with ``renew`` of the content after the change,
    where that is JSON.
    """
    changed = copy.deepcopy(content)
    holder: Any = changed
    for key in place[:-1]:
        holder = holder[key]
    key, before = place[-1], holder[place[-1]]
    spelled = SPELLINGS.get(change, "")
    if change == "removed":
        del holder[key]
    elif change == "twice":
        holder[key], spelled = _HERE, f"0, {json.dumps(key)}: {json.dumps(before)}"
    elif change == "plus 1":
        holder[key] = before + 1
    else:
        holder[key] = _HERE
    name = f"{'.'.join(map(str, place))}: {change}{' (checksum renewed)' if renew else ''}"

    def text(extra: dict[str, Any]) -> str:
        return json.dumps(changed | extra).replace(json.dumps(_HERE), spelled)

    kept = with_checksum(content)[CHECKSUM]
    if renew:
        with contextlib.suppress(ValueError, RecursionError):
            kept = with_checksum(json.loads(text({})))[CHECKSUM]
    return Mutation(name, text({CHECKSUM: kept}))


def changes(content: dict[str, Any], place: Place) -> list[str]:
    """Return the names of the changes that a value can undergo."""
    value: Any = content
    for key in place:
        holder, value = value, value[key]
    found = ["removed", *SPELLINGS]
    found += ["twice"] if isinstance(holder, dict) else []
    return found + (["plus 1"] if type(value) is int else [])


def mutations(content: dict[str, Any], renew: bool) -> Iterator[Mutation]:
    """Yield every change of every value of an object, and texts that are no object at all."""
    for place in places(content):
        for change in changes(content, place):
            yield mutate(content, place, change, renew)
    for spelled in ("", "null", "0", "[]", '"x"', "[" * 100_000, '{"a":' * 100_000, "\ufeff{}"):
        yield Mutation(f"in place of the file: {spelled[:9]}", spelled)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def failures(
    found: Iterable[Mutation],
    path: Path,
    use: Callable[[], Any],
    same: Callable[[Any], bool],
    write: Callable[[Path, str], None] = write_text,
    named: str = "",
) -> list[str]:
    """Write each mutation to ``path`` and use it; return what is neither refused nor the same.

    A refusal is an InputError of one line, not very long, that names the file or its folder, or
    begins with ``named``.
    """
    wrong = []
    for name, text in found:
        write(path, text)
        outcome = _outcome(path, use, same, named or str(path.parent))
        if outcome:
            wrong.append(f"{name}: {outcome}")
    return wrong


def _outcome(path: Path, use: Callable[[], Any], same: Callable[[Any], bool], named: str) -> str:
    try:
        result = use()
    except InputError as error:
        said = str(error)
        is_one_line = len(said.splitlines()) == 1 and len(said) <= LONGEST
        is_named = str(path.parent) in said or said.startswith(named)
        return "" if is_one_line and is_named else f"says {said[:300]!r}"
    except BaseException as error:  # a panic, too
        return f"{type(error).__name__}: {error}"[:300]
    return "" if same(result) else f"is accepted: {result!r}"[:300]
