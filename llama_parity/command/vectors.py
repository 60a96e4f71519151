"""``llama-parity vectors``: list, copy and check the golden vectors (docs/vectors.md)."""

from collections.abc import Sequence
from pathlib import Path

from llama_common.errors import InputError
from llama_common.nearest import did_you_mean

from ..running import run

HELP = """\
usage: llama-parity vectors list
       llama-parity vectors copy FOLDER
       llama-parity vectors check FOLDER [--float32-angles]

Small cases as files: weights, inputs, and what must come out, with the error that is allowed.

  list                  print each case: its name, a sentence, and what it needs
  copy                  copy the files into a new or empty folder
  check                 compare traces of yours with the cases: a file CASE.safetensors for each
  --float32-angles      rotary angles are multiplied in float32: their error is allowed for
  --vectors FOLDER      of each: the vectors of a copy, not those that are installed

Exit code: 0 = no case failed, 1 = one did, 2 = bad input."""

ANGLES, VECTORS = "--float32-angles", "--vectors"
# What each action takes besides --vectors: how many folders, and its flags.
ACTIONS = {"list": (0, ()), "copy": (1, ()), "check": (1, (ANGLES,))}


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    action, *rest = argv
    if action not in ACTIONS:
        meant = did_you_mean(action, ACTIONS) or f" give one of {', '.join(ACTIONS)}"
        raise InputError(f"vectors {action}: no such action;{meant}")
    from parity_tests.vectors import check, folder

    vectors, rest = _take_vectors(action, rest)
    vectors = vectors or folder.VECTORS
    folders, flags = _split(action, rest)
    if action == "list":
        print("\n".join(folder.list_cases(vectors)))
        return 0
    [given] = folders
    if action == "copy":
        count = folder.copy_vectors(given, vectors)
        print(f"{count} cases copied to {given}; begin with those named basic-")
        return 0
    verdicts = check.check(given, ANGLES in flags, vectors)
    print("\n".join(check.report(verdicts)))
    return check.exit_code(verdicts)


def _take_vectors(action: str, words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the folder that --vectors names, None without it, and the other words."""
    words = [part for word in words for part in _at_equals(word)]
    if VECTORS not in words:
        return None, words
    at = words.index(VECTORS)
    if at + 1 == len(words):
        raise InputError(f"vectors {action}: {VECTORS} takes a folder, got none")
    return Path(words[at + 1]), words[:at] + words[at + 2 :]


def _at_equals(word: str) -> list[str]:
    """Return --vectors=FOLDER as its two words, any other as it is."""
    return word.split("=", 1) if word.startswith(f"{VECTORS}=") else [word]


def _split(action: str, words: list[str]) -> tuple[list[Path], set[str]]:
    """Return the folders and the flags among the words; InputError for what is not taken."""
    count, known = ACTIONS[action]
    flags = {word for word in words if word.startswith("-")}
    for flag in sorted(flags - {*known}):
        meant = did_you_mean(flag, (*known, VECTORS)) or " see llama-parity vectors --help"
        raise InputError(f"vectors {action}: has no flag {flag};{meant}")
    folders = [word for word in words if word not in flags]
    if len(folders) != count:
        wanted = "one folder" if count else "nothing after it"
        raise InputError(f"vectors {action}: takes {wanted}, got {' '.join(folders) or 'none'}")
    return [Path(word) for word in folders], flags
