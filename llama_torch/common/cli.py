"""From an argument list to a validated config, and from a user's mistake to one line."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from .errors import InputError, VerificationError

C = TypeVar("C")


def parse(config_class: type[C], argv: Sequence[str], defaults: Sequence[str] = ()) -> C:
    """Build ``config_class`` from flags; ``defaults`` are flags that ``argv`` overrides.

    Raises InputError with tyro's complaint on one line. ``--help`` prints and exits.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=[*defaults, *argv],
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise InputError(_one_line(complaint.getvalue())) from None


def toml_flags(path: str, config_class: type[Any]) -> list[str]:
    """Turn a TOML file into the flags it stands for; sections are for the eye only."""
    try:
        with Path(path).open("rb") as file:
            table = tomllib.load(file)
    except (OSError, ValueError) as error:  # not TOML, not UTF-8
        raise InputError(f"--config {path}: cannot be read ({error}); fix the file") from None
    for key in ("config", "resume"):
        if key in table:
            raise InputError(f"--config {path}: {key} belongs on the command line; remove it")
    known = _field_names(config_class)
    for section, value in table.items():
        for key in value if isinstance(value, dict) else (section,):
            if key not in known:
                raise InputError(
                    f"--config {path}: unknown setting {key}; see --help for the names"
                )
    return as_flags(table)


def _field_names(config_class: type[Any]) -> set[str]:
    names: set[str] = set()
    for field in dataclasses.fields(config_class):
        nested = dataclasses.is_dataclass(field.type)
        names |= _field_names(field.type) if nested else {field.name}  # type: ignore[arg-type]
    return names


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Turn ``{"model": {"n_layers": 2}, "data": ["a", "b"]}`` into ``--n-layers=2 --data a b``."""
    flags: list[str] = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            flags += as_flags(value)
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            flags += [f"--{name}", *map(str, value)]
        else:  # one word, so that a value may begin with a dash
            flags.append(f"--{name}={value}")
    return flags


def early_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Read --config, --out and --resume first: the other flags' defaults depend on them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--out"):
        # A forgotten value is left for tyro to report.
        parser.add_argument(name, nargs="?", default="", const="")
    parser.add_argument("--resume", action="store_true")
    try:
        return parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError as error:
        raise InputError(f"{str(error).removeprefix('argument ')}; see --help") from None


def run(main: Callable[[], int]) -> int:
    """Call ``main``; an InputError becomes one line on stderr and exit code 2.

    A VerificationError is 1. What the operating system refuses (a full disk, a name too long) is
    2 as well. Ctrl-C is 130, and a reader of the output that went away 141, as shells count them.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (VerificationError, InputError, OSError) as error:
        complain(error)
        return 1 if isinstance(error, VerificationError) else 2


def complain(error: Exception) -> None:
    """Print an error on one line of stderr, whatever the names in it hold."""
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)


def _one_line(box: str) -> str:
    """Take the message out of tyro's framed, wrapped complaint."""
    # The frame is drawn in ASCII where the terminal's encoding has no lines.
    lines = [re.sub(r"[╭╮╰╯│─]|^[|+]|[|+]$|-{3,}", "", line).strip() for line in box.splitlines()]
    text = []
    for line in lines[1:]:
        if line.startswith(("Argument helptext", "For full helptext", "Perhaps you meant")):
            break
        text.append(line)
    message = " ".join(" ".join(text).split()) or " ".join(" ".join(lines).split())
    message = re.sub(r"^Error parsing \w+: (?=--)", "", message)
    return f"{message}; see --help"
