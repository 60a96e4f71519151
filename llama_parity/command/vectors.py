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

Exit code: 0 = no case failed, 1 = one did, 2 = bad input."""

ANGLES = "--float32-angles"
ACTIONS = ("list", "copy", "check")


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
    float32_angles = action == "check" and ANGLES in rest
    folders = [word for word in rest if not (float32_angles and word == ANGLES)]
    flags = [word for word in folders if word.startswith("-")]
    if flags or len(folders) != (action != "list"):
        wanted = "nothing after it" if action == "list" else "one folder"
        raise InputError(f"vectors {action}: takes {wanted}, got {' '.join(rest) or 'none'}")
    from parity_tests.vectors import check

    if action == "list":
        print("\n".join(check.list_cases()))
        return 0
    folder = Path(folders[0])
    if action == "copy":
        print(f"{folder}: {check.copy_vectors(folder)} cases; index.json has their names")
        return 0
    verdicts = check.check(folder, float32_angles)
    print("\n".join(check.report(verdicts)))
    return check.exit_code(verdicts)
