"""Settings that stand in a file, TOML or JSON: values of a config's fields, checked by type."""

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from .errors import InputError, shown
from .flags import nested_defaults
from .nearest import did_you_mean

C = TypeVar("C")

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class Setting(NamedTuple):
    """The value of a config's field, and the file that gave it."""

    value: Any
    source: str


Settings = Mapping[str, Setting]  # by the field's name


def read_toml(path: str, config_class: type[Any]) -> dict[str, Setting]:
    """Return the settings of a TOML file; sections are for the eye only.

    Raises InputError that names the file and the key of what is wrong.
    """
    source = f"--config {path}"
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError("no regular file")  # a pipe is not waited for, nor a device read
        with Path(path).open("rb") as file:
            table = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:  # not TOML, not UTF-8
        raise InputError(f"{source}: cannot be read ({error}); fix the file") from None
    settings = check_settings(table, config_class, source)
    for key in ("config", "resume"):
        if key in settings:
            raise InputError(f"{source}: {key} belongs on the command line; remove it")
    return settings


def check_settings(
    table: Mapping[str, Any], config_class: type[Any], source: str
) -> dict[str, Setting]:
    """Return the values of a table, whose sections' keys count as its own, as settings.

    Raises InputError that names ``source`` and a key that is unknown, stands twice, or has a value
    of another type than the field.
    """
    types, groups = _field_types(config_class), _group_names(config_class)
    settings: dict[str, Setting] = {}
    for name, content in table.items():
        is_section = isinstance(content, dict) and (name in groups or name not in types)
        for key, value in content.items() if is_section else [(name, content)]:
            if key not in types:
                near = did_you_mean(key, types)
                raise InputError(
                    f"{source}: unknown setting {key};{near} see --help-all for the names"
                )
            if key in settings:
                raise InputError(f"{source}: {key} stands there twice; keep one")
            settings[key] = Setting(_checked(value, types[key], f"{source}: {key}"), source)
    return settings


def as_default(config_class: type[C], settings: Settings) -> C:
    """Return a config with its fields' defaults but for ``settings``, whose values are unchecked.

    What contradicts another value may be right beside a flag's: the config that is built of this
    one is checked.
    """
    return _overlaid(config_class, None, settings)


def _overlaid(config_class: type[C], given: object, settings: Settings) -> C:
    """Return a config of ``settings``, else of the attributes of ``given``, else of defaults."""
    config = object.__new__(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        value: Any = getattr(given, field.name, field.default)
        if dataclasses.is_dataclass(field.type):
            value = _overlaid(field.type, nested_defaults(field), settings)  # type: ignore[arg-type]
        elif field.name in settings:
            value = settings[field.name].value
        object.__setattr__(config, field.name, value)
    return config


def build(config_class: type[C], settings: Settings) -> C:
    """Build a config without nested ones from the settings that are its fields.

    Raises InputError that names the file of a wrong value.
    """
    names = (field.name for field in dataclasses.fields(config_class))  # type: ignore[arg-type]
    try:
        return config_class(**{name: settings[name].value for name in names if name in settings})
    except InputError as error:
        raise InputError(name_source(str(error), settings, ())) from None


def name_source(message: str, settings: Settings, argv: Sequence[str]) -> str:
    """Return an error's message with a file's key in place of the flag, where the file gave it."""
    flag = re.match(r"--([\w-]+)(?= )", message)
    key = flag[1].replace("-", "_") if flag else ""
    if not flag or key not in settings or flag_names(argv) & {key, f"no_{key}"}:
        return message
    return f"{settings[key].source}: {key}{message[flag.end() :]}"


def flag_names(argv: Sequence[str]) -> set[str]:
    """Return the names of the flags on a command line, spelt as fields are."""
    flags = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return {flag[2:].replace("-", "_") for flag in flags}


def _field_types(config_class: type[Any]) -> dict[str, Any]:
    """Return the type of every field by name, those of nested configs too."""
    types: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        nested = dataclasses.is_dataclass(field.type)
        types |= _field_types(field.type) if nested else {field.name: field.type}  # type: ignore[arg-type]
    return types


def _group_names(config_class: type[Any]) -> set[str]:
    """Return the names of the fields that are configs themselves."""
    fields = dataclasses.fields(config_class)
    return {field.name for field in fields if dataclasses.is_dataclass(field.type)}


def _checked(value: Any, kind: Any, where: str) -> Any:
    """Return a value as one of a field's type; raise InputError that begins with ``where``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            near = did_you_mean(value if isinstance(value, str) else "", arguments)
            _wrong(where, f"one of {', '.join(arguments)}", value, near)
        return value
    if origin is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_checked(each, arguments[0], where) for each in values)
    if kind is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if type(value) is not kind:
        _wrong(where, NAMES[kind], value)
    if kind is str:
        _require_usable(value, where)
    return value


def _require_usable(text: str, where: str) -> None:
    """Raise InputError for a text that no command line could hold: a zero byte, half a character.

    The halves that stand for bytes of another encoding, as in a file's name, are kept.
    """
    try:
        usable = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        _wrong(where, "valid text", text)


def _wrong(where: str, requirement: str, value: Any, near: str = "") -> NoReturn:
    text = shown(value)
    text = text if len(text) < 80 else f"{text[:80]}..."
    raise InputError(f"{where} must be {requirement}, got {text};{near} correct it")
