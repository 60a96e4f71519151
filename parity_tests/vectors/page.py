"""The page docs/vectors.md, with the table of the known bugs by the cases that tell them."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

TEMPLATE = Path(__file__).parent / "page.md"


def text(index: Mapping[str, Any]) -> str:
    """Return the page of an index."""
    page = TEMPLATE.read_text(encoding="utf-8")
    counts = {
        "CASES": str(len(index["cases"])),
        "MODELS": str(len(index["models"])),
        "FLAGS": str(len(index["flags"])),
        "BFLOAT16": _middle_bound(index, "bfloat16"),
        "FLOAT16": _middle_bound(index, "float16"),
        "BUG_TABLE": _bugs(index),
        "CASE_TABLE": _cases(index),
    }
    for word, value in counts.items():
        page = page.replace("{{" + word + "}}", value)
    return page


def _middle_bound(index: Mapping[str, Any], precision: str) -> str:
    """Return the bound that half of a precision's are above, with two digits."""
    column = index["precisions"].index(precision)
    rows = [row for case in index["cases"] for row in case["bounds"].values()]
    return f"{median(row[column] for row in rows if row[column] is not None):.2g}"


def _bugs(index: Mapping[str, Any]) -> str:
    rows = ["| flag | class | effect | cases in float32 | in float64 alone | for one |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for name, note in index["flags"].items():
        shown, later = (
            [case["id"] for case in index["cases"] if name in case[kind]]
            for kind in ("flags", "flags_float64_only")
        )
        effect = note["effect"].replace("|", "\\|")
        # The case with the fewest other bugs points to this one best.
        fewest = min(
            (case for case in index["cases"] if case["id"] in shown),
            key=lambda case: len(case["flags"]),
        )
        words = name, note["bug_class"], effect, len(shown), len(later), fewest["id"]
        rows.append("| `{}` | {} | {} | {} | {} | `{}` |".format(*words))
    return "\n".join(rows)


def _cases(index: Mapping[str, Any]) -> str:
    rows = ["| case | model | tests | needs | flags |", "| --- | --- | --- | --- | --- |"]
    for case in index["cases"]:
        words = case["id"], case["model"], case["about"], ", ".join(case["needs"])
        rows.append("| `{}` | {} | {} | {} | {} |".format(*words, len(case["flags"])))
    return "\n".join(rows)
