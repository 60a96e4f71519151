"""The errors of a user's input, and the checks that raise them."""

import dataclasses


class InputError(ValueError):
    """An error in a user's input; the message names the input and the remedy."""


class VerificationError(Exception):
    """A model in training differs from the oracle; the message names quantity, error and bound."""


def check(valid: bool, flag: str, value: object, requirement: str) -> None:
    """Raise InputError naming the flag unless ``valid``."""
    if not valid:
        raise InputError(f"--{flag.replace('_', '-')} {requirement}, got {value!r}")


def check_positive(config: object, *names: str) -> None:
    """Raise InputError naming the first of these fields that is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        # No float holds an integer much larger than this.
        check(0 < value < 1e300, name, value, "must be positive")


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
