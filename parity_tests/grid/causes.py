"""The causes of red cells, each confirmed without this project: causes/NAME.toml."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llama_common.errors import InputError

CAUSES = Path(__file__).with_name("causes")
OPTIONAL = ("repeat", "code", "bug", "documented")
FINDINGS = Path(__file__).parent.parent.parent / "findings"


@dataclass(frozen=True)
class Cause:
    """Why checks of a port are red.

    port     the module's name, or NAME:OBJECT for some of its backends; a pattern with *
    checks   patterns of the checks' ids
    title    a line
    words    what happens, whom it concerns, and the remedy
    repeat   the script in findings/ that shows it without this project; or "" where ``code`` does
    code     a program that shows it, pinned packages in its first line
    bug      the known bug that it equals; "" for none
    seen     a regular expression that is found in what the failure says (``said``), so that a
             check that fails by another fault is not taken for explained
    documented  where the package's documentation says so: no fault then; "" where it does not
    """

    port: str
    checks: tuple[str, ...]
    seen: str
    title: str
    words: str
    repeat: str = ""
    code: str = ""
    bug: str = ""
    documented: str = ""

    def explains(self, name: str, backend: str, check: Mapping[str, Any]) -> bool:
        """Return whether this is the cause of a red check of a result."""
        port, _, wanted = self.port.partition(":")
        return (
            fnmatchcase(name, port)
            and fnmatchcase(backend, wanted or "*")
            and any(fnmatchcase(check["id"], _literal(pattern)) for pattern in self.checks)
            and re.search(self.seen, said(check)) is not None
        )

    @property
    def anchor(self) -> str:
        """The name of its section in the page."""
        return "".join(c if c.isalnum() else "-" for c in f"{self.port} {self.title}".lower())


def said(check: Mapping[str, Any]) -> str:
    """Return what a failure says: its message, what was drawn, the config and the call."""
    failure = check["failure"] or {}
    return " | ".join(str(failure.get(key)) for key in ("message", "drawn", "config", "call"))


def _literal(pattern: str) -> str:
    """Return a pattern in which [ is itself, as the ids have it, and * alone is special."""
    return pattern.replace("[", "[[]")


def read_causes(folder: Path = CAUSES) -> list[Cause]:
    """Return the causes of all files; InputError for a file that is not as described."""
    return [cause for file in sorted(folder.glob("*.toml")) for cause in _read(file)]


def _read(file: Path) -> list[Cause]:
    try:
        listed: Any = tomllib.loads(file.read_text(encoding="utf-8"))["cause"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{file}: is no list of causes ({error})") from None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise InputError(f"{file}: is no list of causes; begin each with [[cause]]")
    for entry in listed:
        _require(entry, file)
    return [Cause(**entry | {"checks": tuple(entry["checks"])}) for entry in listed]


def _require(entry: dict[str, Any], file: Path) -> None:
    """Raise InputError for a cause with a key that is unknown, missing or of another type."""
    known = [one.name for one in fields(Cause)]
    if unknown := set(entry) - set(known):
        raise InputError(f"{file}: {unknown.pop()}: no key of a cause; {', '.join(known)} are")
    repeat, title = entry.get("repeat", ""), entry.get("title")
    if repeat and isinstance(repeat, str) and repeat not in os.listdir(FINDINGS):
        raise InputError(f"{file}: repeat {repeat}: no such file in findings/")
    if not (repeat or entry.get("code")):
        raise InputError(f"{file}: {title}: give repeat or code, that confirm it")
    for key in known:
        value = entry.get(key, "")
        is_text = isinstance(value, str) and (value or key in OPTIONAL)
        is_list = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        if not (is_list if key == "checks" else is_text):
            kind = "a list of patterns" if key == "checks" else "a text"
            raise InputError(f"{file}: {title}: {key}: give {kind}")
    try:
        re.compile(entry.get("seen", ""))
    except re.error as error:
        raise InputError(f"{file}: {title}: seen: {error}") from None
