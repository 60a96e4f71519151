"""The help of a command: its basic flags on one screen, or all of them.

A command's config class may have three class variables: ``command``, how the command is typed;
``basic``, the names of the fields that ``--help`` shows, in order, without which it shows all; and
``hidden``, the names of inherited fields that no help shows, as the command refuses them.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .flags import HELP_FLAGS, Flag, flags_of

WIDTHS = 60, 100  # least and greatest, in columns
MARGIN = 24  # of the texts, in columns
METAVARS = {int: "N", float: "X", str: "TEXT", bool: ""}
PLACE = re.compile(r"(\w+ )?(files?|folders?|directory)\b", re.IGNORECASE)  # begins a path's text


def is_asked(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for help, in place of the command."""
    words = argv[: list(argv).index("--")] if "--" in argv else argv
    return any(word in HELP_FLAGS for word in words)


def render(config_class: type[Any], defaults: Any, everything: bool) -> str:
    """Return the help as text: how it is typed, what the command does, and its flags.

    ``defaults`` is an instance whose values are shown as the fields' defaults; None for their own.
    """
    hidden = getattr(config_class, "hidden", "").split()
    flags = [flag for flag in flags_of(config_class, defaults) if flag.name not in hidden]
    by_name = {flag.name: flag for flag in flags}
    basic = getattr(config_class, "basic", "").split()
    shown = flags if everything or not basic else [by_name[name] for name in basic]
    typed = _wrapped(usage(config_class, flags), hanging=" " * len("usage: "))
    lines = [*typed, "", *_wrapped(_summary(config_class)), ""]
    texts = {config: _field_texts(config) for config in {flag.config for flag in flags}}
    for config, group in groupby(shown, lambda flag: flag.config if everything else None):
        if config not in (None, config_class):
            lines += ["", *_wrapped(_summary(config))]
        for flag in group:
            text = texts[flag.config][flag.name]
            lines += _entry(flag, text if everything else text.partition(". ")[0].rstrip("."))
    n_more = len(flags) - len(shown)
    end = f"-h, --help shows this; --help-all shows {n_more} flags more." if n_more else ""
    if not end:
        end = f"-h, --help shows {'the first ones of these' if basic else 'this'}."
    return "\n".join([*lines, "", *_wrapped(end)])


def usage(config_class: type[Any], flags: Sequence[Flag]) -> str:
    """Return how the command is typed, with what it requires."""
    required = [flag for flag in flags if flag.default is dataclasses.MISSING]
    words = [flag.metavar or _left(flag, _field_texts(flag.config)[flag.name]) for flag in required]
    return " ".join(
        [
            "usage:",
            getattr(config_class, "command", ""),
            *words,
            *["[FLAGS]"] * (len(flags) > len(words)),
        ]
    )


def _entry(flag: Flag, text: str) -> list[str]:
    """Return the lines of one flag: its name at the left, what it does, values and default."""
    values = f"; one of {', '.join(filter(None, flag.choices))}" if flag.choices else ""
    default = "required" if flag.default is dataclasses.MISSING else f"default: {_shown(flag)}"
    wrapped = _wrapped(f"{text.rstrip('.')}{values} ({default})", " " * MARGIN)
    left = f"  {_left(flag, text)}"
    if len(left) > MARGIN - 2:
        return [left, *wrapped]
    return [left.ljust(MARGIN) + wrapped[0][MARGIN:], *wrapped[1:]]


def _left(flag: Flag, text: str) -> str:
    """Return a flag with a word for its value, or a positional argument's name."""
    if flag.metavar:
        return flag.metavar
    kind = typing.get_args(flag.kind)[0] if flag.takes_many else flag.kind
    metavar = "NAME" if flag.choices else METAVARS[kind]
    metavar = "PATH" if kind is str and PLACE.match(text) else metavar
    word = f"--[no-]{flag.word[2:]}" if flag.default is True else flag.word
    return f"{word} {metavar}{' ...' * flag.takes_many}".strip()


def _shown(flag: Flag) -> str:
    """Return a flag's default as text."""
    if isinstance(flag.default, bool):
        return "on" if flag.default else "off"
    if flag.default in ("", ()):
        return "empty" if flag.default == "" else "none"
    return " ".join(map(str, flag.default)) if flag.takes_many else str(flag.default)


def _summary(config_class: type[Any]) -> str:
    """Return the first paragraph of a class's docstring."""
    return inspect.cleandoc(config_class.__doc__ or "").partition("\n\n")[0]


def _field_texts(config_class: type[Any]) -> dict[str, str]:
    """Return the docstring below each field of a config class, on one line.

    A field that it inherits has that of the class which it comes from.
    """
    texts: dict[str, str] = {}
    for base in config_class.__bases__:
        if dataclasses.is_dataclass(base):
            texts |= _field_texts(base)
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                texts[name] = " ".join(text.split())
    return texts


def _wrapped(text: str, indent: str = "", hanging: str = "") -> list[str]:
    """Return a text as lines no wider than the terminal; ``hanging`` begins all but the first."""
    least, greatest = WIDTHS
    width = min(max(shutil.get_terminal_size((greatest, 24)).columns, least), greatest)
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_on_hyphens=False,
    )
