"""The flags of ``llama-parity test`` that are refused before anything is imported or run."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_common.errors import InputError
from llama_common.files import require_writable
from llama_common.nearest import did_you_mean

OWN = (
    *("--help", "--new", "--basic", "--no-basic", "--list", "--profile", "--report", "--backend"),
    *("--check", "--xfails-file", "--skips-file", "--reproduce", "--poison"),
)
# Pytest's flags whose value is the next word.
WITH_VALUE = ("-k", "-m", "-p", "-o", "-c", "-n", "-r", "-W")
OF_XDIST = ("-n", "--numprocesses", "--dist", "--maxprocesses", "--tx")
OF_JUNIT = ("--junitxml", "--junit-xml")


def require_alone(flag: str, words: Sequence[str], why: str) -> None:
    """Raise InputError for flags beside one that would leave them without effect."""
    if words:
        raise InputError(f"{flag} {why}: {' '.join(words)} would change nothing; leave it out")


def require_usable(words: Sequence[str]) -> None:
    """Raise InputError for a flag of a package that is not installed, and for an output file.

    That file is one that pytest writes when the run ends, and cannot.
    """
    if words and words[-1] in (*WITH_VALUE, *OF_XDIST, *OF_JUNIT):
        raise InputError(f"{words[-1]}: its value is missing; see llama-parity test --help")
    for flag, value in _flags(words):
        if flag in OF_XDIST and importlib.util.find_spec("xdist") is None:
            raise InputError(
                f"{flag}: needs pytest-xdist, which runs checks on several cores; "
                f"pip install pytest-xdist, or leave {flag} out"
            )
        if flag in OF_JUNIT and value:
            path = Path(value).resolve()
            if not path.is_dir():  # pytest says that it is one, and makes its folder
                made = next(folder for folder in path.parents if folder.exists())
                require_writable(made / path.relative_to(made).parts[0], f"{flag} {value}")


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each flag with its value: what follows "=", else the next word, or -n's digits."""
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if not word.startswith("-") or before in WITH_VALUE:
            continue
        flag, equals, value = word.partition("=")
        if word.startswith("-n") and word != "-n":
            flag, value = "-n", word[2:]
        elif not equals:
            value = words[i + 1] if i + 1 < len(words) else ""
        yield flag, value


def of_unknown(complaint: str) -> str:
    """Return pytest's complaint; of an unknown flag a sentence with the nearest one of ours."""
    unknown = complaint.partition("unrecognized arguments: ")[2].split()
    word = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
    if not word:
        return complaint
    return f"{word}: no such flag;{did_you_mean(word, OWN)} see llama-parity test --help"
