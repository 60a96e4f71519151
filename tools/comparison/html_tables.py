"""The tables of a comparison's HTML page."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .judging import REORDERED

Row = Mapping[str, Any]

PARTS = ("inherited", "fresh")

UNMEASURED = ("missing", "not finite", "misshapen", REORDERED)

STATUSES = ("diverges", *UNMEASURED, "inherits", "ok")  # the order of what to say first

MOST_FAILED, MOST_ROWS, MOST_TOKENS = 200, 2000, 512


# --- Tables ---


def _rows(rows: Sequence[Row], parts: Sequence[str], names: Sequence[str]) -> str:
    """Return the rows that went wrong by themselves, and all of them folded away."""
    counts = Counter(row["status"] for row in rows)
    said = ", ".join(f"{status}: {counts[status]}" for status in STATUSES if counts[status])
    said = said or "nothing compared"
    failed = [row for row in rows if row["status"] not in ("ok", "inherits")]
    return (
        f'<p class="soft">{said}. Errors and bounds are root mean squares; "of bound" is the '
        "largest of the rms, worst-element and worst-token errors as a share of its own bound."
        f"</p>{_table(failed, parts, names, MOST_FAILED)}<details><summary>All "
        f"{_count(len(rows), 'row')}</summary>{_table(rows, parts, names, MOST_ROWS)}</details>"
    )


def _table(
    rows: Sequence[Row], parts: Sequence[str], names: Sequence[str], most: int = MOST_ROWS
) -> str:
    """Return every error beside its bound; calls only where there are names of them."""
    if not rows:
        return ""
    text = '<div class="scroll"><table><thead><tr><th rowspan="2">name</th>'
    text += '<th rowspan="2" class="l">status</th>'
    text += "".join(f'<th colspan="3">{part}</th>' for part in parts)
    text += '<th rowspan="2" class="l">call</th></tr><tr>' if names else "</tr><tr>"
    text += "<th>rms</th><th>bound</th><th>of bound</th>" * len(parts) + "</tr></thead><tbody>"
    for row in rows[:most]:
        name = row["name"].replace(" model.", " ").removesuffix(".weight")
        text += f"<tr><td><code>{escape(name)}</code></td>"
        text += f'<td class="l {_css(row["status"])}">{escape(row["status"])}</td>'
        for part in parts:
            if (error := row[part]) is None:
                text += "<td>&ndash;</td>" * 3
                continue
            text += f"<td>{_show(error['rms'])}</td><td>{_show(error['bound']['rms'])}</td>"
            text += "<td class=diverges>" if _is_out(row, part) else "<td>"
            text += f"{_show(error['share'], '.2g')}</td>"
        text += f'<td class="l call">{escape(_call(row, names))}</td>' if names else ""
        text += "</tr>"
    left = len(rows) - most
    left_out = f'<p class="soft">{left} more left out.</p>' if left > 0 else ""
    return f"{text}</tbody></table></div>{left_out}"


def _number(value: float | None) -> float:
    """Return the value; infinity where it is not finite, which the report writes as null."""
    return value if value is not None and math.isfinite(value) else math.inf


def _rms(error: Mapping[str, Any] | None) -> float:
    return math.nan if error is None else _number(error["rms"])


def _show(value: float | None, style: str = ".1e") -> str:
    return f"{value:{style}}" if _number(value) < math.inf else "not finite"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _call(row: Row, names: Sequence[str]) -> str:
    return f"call {row['call']}, {names[row['call']]}"


def _css(status: str) -> str:
    return "unmeasured" if status in UNMEASURED else escape(status)


def _is_out(row: Row, part: str) -> bool:
    """Return whether this error is out of bound, or the row has none to measure."""
    if row["status"] == "ok":
        return False
    if row[part] is None:
        return part != "fresh" and row["status"] in UNMEASURED
    return _number(row[part]["share"]) > 1


def _worst(rows: Sequence[Row], parts: Sequence[str]) -> Row:
    """Return the call to show: out of bound before within, then the largest rms."""

    def badness(row: Row) -> tuple[int, float]:
        rms = [_rms(row[part]) for part in parts if row[part]]
        return sum(_is_out(row, part) for part in parts), max(rms, default=-1.0)

    return max(rows, key=badness)


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    """Group by a column, or by a function of the row."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row) if callable(key) else row[key], []).append(row)
    return groups
