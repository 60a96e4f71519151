"""Find the text files of a folder or a glob by one walk, which follows symbolic links."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from .formats import ENDINGS, decompressed_name, ending

ANY_DEPTH = "**"
SHOWN = 5  # kinds of files passed over that a message names

# What may match a pattern and is no file to read.
FOLDER, UNREADABLE, BROKEN, SPECIAL = "folder", "unreadable folder", "broken link", "special file"
COPY = "compressed copy"
PLURALS = {noun: f"{noun}s" for noun in (FOLDER, UNREADABLE, BROKEN, SPECIAL)}
PLURALS[COPY] = "compressed copies"

States = frozenset[int]  # indices of a pattern's parts that may match the next name; their number
# itself says that all have matched


@dataclass
class Found:
    """The text files of a folder or glob, and counts of the files that are not read."""

    files: dict[str, Path] = field(default_factory=dict)  # by real path, in order
    passed_over: Counter[str] = field(default_factory=Counter)  # by kind: an ending or a noun
    hidden: int = 0  # names; a hidden folder is one

    def describe_passed_over(self) -> str:
        """Return the counts of what is not read: "2 .py, 1 broken link, 1 hidden"; else ""."""
        shown = self.passed_over.most_common(SHOWN)
        counts = [f"{n} {PLURALS.get(kind, kind) if n > 1 else kind}" for kind, n in shown]
        others = self.passed_over.total() - sum(n for _, n in shown)
        counts += [f"{n} {kind}" for kind, n in (("others", others), ("hidden", self.hidden)) if n]
        return ", ".join(counts)


class _Entry(NamedTuple):
    """A name in a folder, reached by a walk."""

    path: Path
    real: str  # path without symbolic links
    states: States
    is_folder: bool


def search(pattern: str) -> Found:
    """Find the text files of a folder, at any depth, or of a glob; empty if there is neither.

    Files come in the order of their paths, compared name by name. Names that begin with a dot
    are left out, unless the glob's own part begins with one. Symbolic links are followed; a file
    that several names lead to counts once, by the first. Of files of one folder whose names differ
    in the compression alone the first is read: the plain one, else ``.gz``.
    """
    found, texts = Found(), set[Path]()
    if not os.path.isdir(pattern) and not _is_magic(pattern):
        return found
    folder, parts = _split(pattern)
    for entry in _walk(folder, parts, found):
        if ending(entry.path) not in ENDINGS:
            found.passed_over[ending(entry.path) or "without an ending"] += 1
        elif not os.path.isfile(entry.real):
            found.passed_over[SPECIAL] += 1
        elif decompressed_name(entry.path) in texts:
            found.passed_over[COPY] += 1
        else:
            texts.add(decompressed_name(entry.path))
            found.files.setdefault(entry.real, entry.path)
    return found


def _split(pattern: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder where the search begins, and the parts that names below it match."""
    if os.path.isdir(pattern):
        return Path(pattern), (ANY_DEPTH, "*")
    names = Path(pattern).parts
    n_plain = next(i for i, name in enumerate(names) if _is_magic(name))
    parts = names[n_plain:]
    if pattern.endswith("/"):  # the folders that match
        parts = (*parts, ANY_DEPTH)
    if parts[-1:] == (ANY_DEPTH,):
        parts = (*parts, "*")
    return Path(*names[:n_plain]), parts


def _is_magic(part: str) -> bool:
    return any(character in part for character in "*?[")


def _walk(folder: Path, parts: tuple[str, ...], found: Found) -> Iterator[_Entry]:
    """Yield the matching files in order; count in ``found`` hidden names, folders, broken links.

    A folder is read once for the same remaining parts, whatever links lead to it: a circle of
    links ends. A stack holds what is to come, however deep the folders are.
    """
    real = os.path.realpath(folder)
    pending = [_Entry(folder, real, _closure({0}, parts), True)]
    read: set[tuple[str, States]] = set()
    while pending:
        entry = pending.pop()
        is_match, remaining = len(parts) in entry.states, entry.states - {len(parts)}
        if not entry.is_folder:
            if is_match:
                yield entry
        elif remaining:
            if (entry.real, remaining) not in read:
                read.add((entry.real, remaining))
                pending += reversed(_entries(entry, parts, found))
        elif is_match:
            found.passed_over[FOLDER] += 1


def _entries(folder: _Entry, parts: tuple[str, ...], found: Found) -> list[_Entry]:
    """Return a folder's names that match so far, sorted; count the others of interest."""
    try:
        with os.scandir(folder.path) as names:
            listed = sorted(names, key=lambda name: name.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        found.passed_over[UNREADABLE] += 1
        return []
    entries = []
    for name in listed:
        path, is_link = folder.path / name.name, name.is_symlink()
        is_folder = os.path.isdir(path) if is_link else name.is_dir()
        states = _step(folder.states, name.name, parts)
        if not states and name.name.startswith("."):
            would_match = _step(folder.states, name.name, parts, takes_hidden=True)
            found.hidden += bool(would_match) and (is_folder or len(parts) in would_match)
        elif states and is_link and not os.path.exists(path):
            if len(parts) in states:
                found.passed_over[BROKEN] += 1
        elif states:
            real = os.path.realpath(path) if is_link else os.path.join(folder.real, name.name)
            entries.append(_Entry(path, real, states, is_folder))
    return entries


def _step(states: States, name: str, parts: tuple[str, ...], takes_hidden: bool = False) -> States:
    """Return the states after a name; empty where it does not match."""
    after = set()
    for i in states - {len(parts)}:
        part = parts[i]
        is_hidden = name.startswith(".") and not part.startswith(".") and not takes_hidden
        if is_hidden:
            continue
        if part == ANY_DEPTH:
            after.add(i)
        elif fnmatchcase(name, part):
            after.add(i + 1)
    return _closure(after, parts)


def _closure(states: set[int], parts: tuple[str, ...]) -> States:
    """Return the states with those after each ANY_DEPTH, which may match no folder."""
    found = set(states)
    for i, part in enumerate(parts):
        if part == ANY_DEPTH and i in found:
            found.add(i + 1)
    return frozenset(found)
