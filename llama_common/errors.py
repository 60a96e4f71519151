"""The errors of a user's input, and the checks that raise them."""

import dataclasses
import shlex

LONGEST = 4000  # characters of a message: a long path and what is wrong with it


class InputError(ValueError):
    """An error in a user's input; the message names the input and the remedy.

    The message is safe to print, whatever the files that it quotes hold; see ``printable``.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class VerificationError(Exception):
    """A model in training differs from the oracle; the message names quantity, error and bound."""


def printable(text: str, limit: int = LONGEST) -> str:
    """Return text on one line of at most ``limit`` characters that a terminal only shows.

    Line breaks become blanks. Control characters, escape sequences, marks that turn the direction
    of writing and lone surrogates are escaped as in Python. Of a longer text the middle is left
    out: a message begins with the file and ends with the remedy.
    """
    line = " ".join(_shortened(text, limit).replace("\t", " ").splitlines())
    if line.isprintable():
        return line
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return _shortened("".join(escaped), limit)


def quoted(text: str) -> str:
    """Return a word of a command line to print: a run's record may hold any characters."""
    return shlex.quote(printable(text))


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    mark = f" ... {len(text) - limit:,} characters left out ... "
    kept = max(0, limit - len(mark))
    return text[: kept - kept // 3] + mark + text[len(text) - kept // 3 :]


def check(valid: bool, flag: str, value: object, requirement: str) -> None:
    """Raise InputError naming the flag unless ``valid``."""
    if not valid:
        raise InputError(f"{flag_of(flag)} {requirement}, got {shown(value)}")


def flag_of(field: str) -> str:
    """Return the flag of a config's field, as it is written on a command line."""
    return f"--{field.replace('_', '-')}"


def shown(value: object) -> str:
    """Return a value as a message shows it: as Python writes it, but for an endless integer."""
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits; TOML can hold one
        return "an integer of thousands of digits"


def check_positive(config: object, *names: str) -> None:
    """Raise InputError naming the first of these fields that is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        # No float holds an integer much larger than this.
        check(0 < value < 1e300, name, value, "must be positive")


def check_between(config: object, *limits: tuple[str, int, int]) -> None:
    """Raise InputError naming the flag of a field below its least or above its largest number."""
    for name, least, most in limits:
        value = getattr(config, name)
        check(value >= least, name, value, f"must be at least {least}")
        check(value <= most, name, value, f"must be at most {most}")


def check_sizes(config: object) -> None:
    """Raise InputError naming the first integer field of 2^31 or more: no size is as large."""
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        if type(item.default) is int:
            value = getattr(config, item.name)
            check(value < 2**31, item.name, value, "must be below 2^31")


def check_types(config: object) -> None:
    """Raise InputError naming the first field whose value is not of its default's type."""
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, item.name), type(item.default)
        accepted = (int, float) if kind is float else (kind,)
        check(type(value) in accepted, item.name, value, f"must be of type {kind.__name__}")


def check_text(flag: str, value: str) -> None:
    """Raise InputError naming the flag for a text that is empty or not Unicode."""
    check(bool(value), flag, value, "must not be empty")
    # Bytes of the command line that are not text arrive as lone surrogates.
    check(not has_surrogates(value), flag, value, "must be valid text")


def is_digits(text: str) -> bool:
    """Return whether a text is a number in the digits 0 to 9, which ``int`` can read."""
    return text.isascii() and text.isdecimal()


def has_surrogates(text: str) -> bool:
    """Return whether a text holds lone surrogates, as bytes of another encoding are decoded to."""
    try:
        text.encode()  # fails for nothing else, and takes no time beside tokenisation
    except UnicodeEncodeError:
        return True
    return False
