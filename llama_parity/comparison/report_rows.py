"""Select, order and group the rows of a comparison's report, for the terminal and the HTML page.

A row is a dictionary of ``report["rows"]``, made by ``report.row_entry``: an activation's name, its
call, its status, and under "inherited" and "fresh" an error beside its bound.
"""

import html
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from llama_common.errors import printable
from reference_np.naming import NORM

from .judging import DOCUMENTED, REORDERED, RIGHT
from .sides import LAST_LOGITS, LOGPROBS_ALONE

RowEntry = Mapping[str, Any]

PARTS = ("inherited", "fresh")  # a row's errors
# What a call offers, where that is less than all activations; other coverage says so itself.
COVERAGE = {
    "logits": "offer their logits alone",
    LAST_LOGITS: "show the logits of their last token alone",
    LOGPROBS_ALONE: "show log-probabilities of targets alone",
}
UNMEASURED = ("missing", "not finite", "misshapen", REORDERED)
STATUSES = (
    "diverges",
    *UNMEASURED,
    "inherits",
    DOCUMENTED,
    "ok",
)  # in the order of the page's lists


def short_name(row: RowEntry) -> str:
    """Return the row's name without the parameter names' "model." and ".weight".

    The final norm keeps them: its gradient would read as the norm of all gradients.
    """
    name: str = row["name"]
    if name.endswith(NORM):
        return name
    return name.replace(" model.", " ").removesuffix(".weight")


def escape(text: str) -> str:
    """Return text for the HTML page, without control characters of the files that it quotes."""
    return html.escape(printable(text))


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def coverage_sentences(report: Mapping[str, Any]) -> list[str]:
    """Return which of the report's calls offer less than all activations, and what instead."""
    names, found = [call["name"] for call in report["calls"]], []
    for covers, count in Counter(report["coverage"]).items():  # in the order of the calls
        which = [name for name, c in zip(names, report["coverage"], strict=True) if c == covers]
        where = "" if count == len(names) else f" ({'; '.join(which)})"
        if covers != "activations":
            what = COVERAGE.get(covers, covers)
            found.append(f"{count} of {len(names)} calls {what}{where}")
    return found


def judged_kl(entry: Mapping[str, Any]) -> list[float]:
    """Return the KL of a call's judged tokens, of an entry of ``report["logits"]``."""
    return [value for row in entry["kl"] for value in row if value is not None]


def wrong_rows(rows: Iterable[RowEntry]) -> list[RowEntry]:
    """Return the rows that are wrong by themselves, or could not be compared."""
    return [row for row in rows if row["status"] not in RIGHT]


def inheriting_rows(rows: Iterable[RowEntry]) -> list[RowEntry]:
    """Return the rows whose operation is right and whose error came with its input."""
    return [row for row in rows if row["status"] == "inherits"]


def finite_or_inf(value: float | None) -> float:
    """Return the value, or infinity for null, the report's spelling of NaN and infinity."""
    return value if value is not None and math.isfinite(value) else math.inf


def rms_of(error: Mapping[str, Any] | None) -> float:
    """Return an error's root mean square; NaN where there is no error."""
    return math.nan if error is None else finite_or_inf(error["rms"])


def is_out(row: RowEntry, part: str) -> bool:
    """Return whether an error of ``PARTS`` is out of bound, or the row has none to measure."""
    if row["status"] == "ok":
        return False
    if row[part] is None:
        return part != "fresh" and row["status"] in UNMEASURED
    return finite_or_inf(row[part]["share"]) > 1


def worst_row(rows: Sequence[RowEntry], parts: Sequence[str]) -> RowEntry:
    """Return the row of the largest error: out of bound before within, then by its rms."""

    def badness(row: RowEntry) -> tuple[int, float]:
        sizes = [rms_of(row[part]) for part in parts if row[part]]
        return sum(is_out(row, part) for part in parts), max(sizes, default=-1.0)

    return max(rows, key=badness)


def group_by(
    rows: Iterable[RowEntry], key: Callable[[RowEntry], Hashable]
) -> dict[Any, list[RowEntry]]:
    """Return the rows by their key, in the order of their first rows."""
    groups: dict[Any, list[RowEntry]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
