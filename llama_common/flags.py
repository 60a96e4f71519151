"""The flags of a config class, by name; a word that is none of them, and the one nearest to it."""

import dataclasses
import re
import typing
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from .errors import InputError, flag_of
from .nearest import did_you_mean

HELP_FLAGS = ("-h", "--help", "--help-all")

# Editors and web pages make one dash of two hyphens; a dash also begins direct speech.
DASHES = "-\u2013\u2014"
FLAG = re.compile(rf"-[^\W\d].*|--\S.*|[{DASHES}]+[^\W\d]\S*", re.DOTALL)

WANTED = {
    int: "a whole number",
    float: "a number",
    tuple[int, ...]: "whole numbers",
    tuple[float, ...]: "numbers",
}


class Flag(NamedTuple):
    """One field of a config class, as a flag or as a positional argument."""

    name: str  # the field's
    kind: Any  # its type, without annotations
    default: Any  # dataclasses.MISSING where a value is required
    config: type[Any]  # the class that has it
    metavar: str  # of a positional argument; else empty

    @property
    def word(self) -> str:
        """The flag as it is written on a command line, or a positional argument's name."""
        return self.metavar or flag_of(self.name)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have; empty = all of its type."""
        kinds = [self.kind, *typing.get_args(self.kind)]
        literals = (kind for kind in kinds if typing.get_origin(kind) is Literal)
        return next((typing.get_args(kind) for kind in literals), ())

    @property
    def takes_many(self) -> bool:
        """Whether several values may follow it."""
        return typing.get_origin(self.kind) is tuple


def flags_of(config_class: type[Any], defaults: Any = None) -> list[Flag]:
    """Return the flags of a config class and of those in it, positional arguments first.

    ``defaults`` is an instance whose values stand for the fields' defaults.
    """
    nested, flags = [], []
    for field in dataclasses.fields(config_class):
        kind: Any = field.type
        if dataclasses.is_dataclass(kind):
            inner = defaults and getattr(defaults, field.name)
            nested += flags_of(kind, inner or nested_defaults(field))  # type: ignore[arg-type]
            continue
        default = getattr(defaults, field.name, field.default)
        metavar = ""
        if typing.get_origin(kind) is Annotated:
            kind, *notes = typing.get_args(kind)
            if tyro.conf.Positional in notes:
                metavar = next((n.metavar for n in notes if hasattr(n, "metavar")), field.name)
        flags.append(Flag(field.name, kind, default, config_class, metavar))
    return sorted(flags, key=lambda flag: not flag.metavar) + nested


def nested_defaults(field: dataclasses.Field[Any]) -> Any:
    """Return the values of a nested config that its default gives and its own class does not."""
    if field.default_factory is dataclasses.MISSING:
        return None
    made = field.default_factory()
    own = vars(type(made)())  # a field that is derived from others has the same value in both
    return SimpleNamespace(**{k: v for k, v in vars(made).items() if v != own[k]})


def require_known(argv: Sequence[str], config_class: type[Any]) -> None:
    """Raise InputError for the first word that looks like a flag and is none, naming the nearest.

    What follows a lone ``--`` is no flag.
    """
    flags = [flag for flag in flags_of(config_class) if not flag.metavar]
    known = {flag.word for flag in flags} | set(HELP_FLAGS)
    known |= {f"--no-{flag.word[2:]}" for flag in flags if flag.kind is bool}
    many = {flag.word for flag in flags if flag.takes_many}
    words = list(argv)[: argv.index("--") if "--" in argv else len(argv)]
    for i, word in enumerate(words):
        name = _name(word)
        following = words[i + 1] if i + 1 < len(words) else None
        if name in many and "=" not in word and (following is None or _name(following) in known):
            raise InputError(f"{word}: its value is missing; see --help")
        if name in known or not FLAG.fullmatch(word) or word.startswith("--tyro-"):
            continue
        value = following if following and not FLAG.fullmatch(following) else ""
        near = did_you_mean(f"--{name.lstrip(DASHES)}", known)
        if not near and not word.startswith("-"):
            continue
        before = words[i - 1] if i else ""
        if not near and before in known:
            near = f" a value that begins with a dash is written {before}={word};"
        raise InputError(f"{f'{word} {value}'.strip()}: no such flag;{near} see --help")


def _name(word: str) -> str:
    """Return a word of the command line without a value after =, underscores as dashes."""
    return word.partition("=")[0].replace("_", "-")


def reworded(complaint: str, config_class: type[Any], argv: Sequence[str]) -> str:
    """Return tyro's complaint in the words of this program's other errors."""
    flags = flags_of(config_class)
    if complaint.startswith("Missing from"):
        given = {_name(word) for word in argv}
        required = [flag for flag in flags if flag.default is dataclasses.MISSING]
        missing = [f.word for f in required if f.metavar in complaint and f.word not in given]
        return f"{' and '.join(missing)}: required" if missing else complaint
    if found := re.match(r"Unrecognized options: (.+)", complaint):
        words = found[1].split(", ")
        at = next((i for i, word in enumerate(argv) if word.endswith(words[0])), 0)
        switch = argv[at].partition("=")[0] if "=" in argv[at] else argv[max(at - 1, 0)]
        on = [f"{f.word}" for f in flags if f.kind is bool and switch in _switches(f)]
        why = f"{on[0]} takes no value; give it alone, or --no-{on[0][2:]}" if on else ""
        return f"{' '.join(words)}: {why or 'belongs to no flag'}"
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'", complaint):
        [flag] = [f for f in flags if found[2].split("/")[-1] in (f.word, f.name)]
        shown = [choice for choice in flag.choices if choice]
        near = did_you_mean(found[1], shown)
        return f"{flag.word} {found[1]}: not one of {', '.join(shown)}{near and f';{near}'}"
    if found := re.match(r"Missing value for argument '(\S+)'", complaint):
        return f"{found[1]}: its value is missing"
    if found := re.match(r"Error parsing (\S+): .*?('.*'\]?)$", complaint):
        numbers = {f.word: f for f in flags if not f.choices}
        kind = numbers[found[1]].kind if found[1] in numbers else None
        if kind in WANTED:
            return f"{found[1]} must be {WANTED[kind]}, got {found[2].rstrip(']')}"
    return complaint


def _switches(flag: Flag) -> tuple[str, str]:
    return flag.word, f"--no-{flag.word[2:]}"
