"""Say which commands show the bug of a backend that failed, if llama-parity compare can see it."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reference_np.backend import dtypes_of, load
from reference_np.limits import limits_of

from ..conformance.handed import OVERWRITES

TRAINING = ("test_loss_and_grads", "test_training")
LONG = ("test_long_logits", "test_long_decoding", "test_long_engine")
# compare reads the weights itself, packs no rows, and continues no cache twice.
UNSEEN = (
    "test_directory",
    "test_key_of_config_json",
    "test_unsupported_key",
    "test_packing",
    "test_reused_cache",
)
LONGEST = 300  # tokens of a check's sequences


def failed_checks(reports: Iterable[Any]) -> Mapping[str, Sequence[str]]:
    """Return by backend the ids of the checks whose numbers were wrong.

    Without those that passed where a failure was expected, and those that wrote to an array.
    """
    found: dict[str, list[str]] = {}
    for report in reports:
        check = getattr(report, "check", {})
        message = check.get("failure", {}).get("message")
        if message is not None and not message.endswith(OVERWRITES):
            found.setdefault(check["backend"], []).append(check["id"])
    return found


def comparison_commands(name: str, failed: Sequence[str], installed: bool = False) -> list[str]:
    """Return the lines that say how to find a backend's bug, its two commands to be pasted.

    ``failed``: ids of checks. No line where compare does not do what they do.
    """
    failed = [check for check in failed if check.partition("[")[0] not in UNSEEN]
    tests = {check.partition("[")[0] for check in failed}
    backend = load(name)
    if dtypes_of(backend)[0] not in ("float64", "float32"):  # of which --grads compares none
        tests -= {*TRAINING}
    if not tests:
        return []
    flags = "" if tests - {*LONG, *TRAINING} else _length(tests)
    flags += _precision(name, failed)
    flags += " --grads" if tests & {*TRAINING} else ""
    shape = limits_of(backend).checkpoint_flags()
    compare = "llama-parity compare" if installed else "python -m llama_parity.compare"
    return [
        "these two commands name the layer, the operation and, where it is a known one, the bug:",
        f"python -m llama_parity.random_checkpoint tiny-llama {shape}",
        f"{compare} tiny-llama --against {shlex.quote(name)}{flags}",
    ]


def _length(tests: set[str]) -> str:
    """Return the flag for sequences as long as those of the checks, where only long ones failed."""
    return f" --tokens {LONGEST}" if tests & {*LONG} else ""


def _precision(name: str, failed: Sequence[str]) -> str:
    """Return the flag for the precision in which checks failed; "" for compare's own choice.

    All but ``test_logits_in`` are of the most precise one.
    """
    known = dtypes_of(load(name))
    given = {check.partition("[")[2].rstrip("]") for check in failed if "logits_in[" in check}
    others = [check for check in failed if "logits_in[" not in check]
    dtype = known[0] if others or not given else min(given, key=known.index)
    default = "float32" if "float32" in known else known[0]
    return "" if dtype == default else f" --dtype {dtype}"
