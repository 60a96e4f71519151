"""Write the tables of a comparison's HTML page."""

from collections import Counter
from collections.abc import Sequence

from .report_rows import (
    STATUSES,
    UNMEASURED,
    RowEntry,
    counted,
    escape,
    finite_or_inf,
    is_out,
    short_name,
    wrong_rows,
)

MOST_FAILED, MOST_ROWS, MOST_TOKENS = 200, 2000, 512  # in the tables and in the heat map


def rows_section(rows: Sequence[RowEntry], parts: Sequence[str], names: Sequence[str]) -> str:
    """Return a table of the wrong rows, and one of all rows, folded away."""
    counts = Counter(row["status"] for row in rows)
    summary = ", ".join(f"{status}: {counts[status]}" for status in STATUSES if counts[status])
    summary = summary or "nothing compared"
    return (
        f'<p class="soft">{summary}. Errors and bounds are root mean squares; "of bound" is the '
        "largest of the rms, worst-element and worst-token errors as a share of its own bound."
        f"</p>{rows_table(wrong_rows(rows), parts, names, MOST_FAILED)}<details><summary>All "
        f"{counted(len(rows), 'row')}</summary>{rows_table(rows, parts, names)}</details>"
    )


def rows_table(
    rows: Sequence[RowEntry], parts: Sequence[str], names: Sequence[str], most: int = MOST_ROWS
) -> str:
    """Return a table of at most ``most`` rows: the errors ``parts`` beside their bounds.

    It has a column of calls where there are ``names`` of them.
    """
    if not rows:
        return ""
    text = '<div class="scroll"><table><thead><tr><th rowspan="2">name</th>'
    text += '<th rowspan="2" class="l">status</th>'
    text += "".join(f'<th colspan="3">{part}</th>' for part in parts)
    text += '<th rowspan="2" class="l">call</th></tr><tr>' if names else "</tr><tr>"
    text += "<th>rms</th><th>bound</th><th>of bound</th>" * len(parts) + "</tr></thead><tbody>"
    text += "".join(_table_row(row, parts, names) for row in rows[:most])
    left = len(rows) - most
    left_out = f'<p class="soft">{left} more left out.</p>' if left > 0 else ""
    return f"{text}</tbody></table></div>{left_out}"


def _table_row(row: RowEntry, parts: Sequence[str], names: Sequence[str]) -> str:
    text = f"<tr><td><code>{escape(short_name(row))}</code></td>"
    text += f'<td class="l {css_class(row["status"])}">{escape(row["status"])}</td>'
    for part in parts:
        if (error := row[part]) is None:
            text += "<td>&ndash;</td>" * 3
            continue
        text += f"<td>{_show(error['rms'])}</td><td>{_show(error['bound']['rms'])}</td>"
        text += "<td class=diverges>" if is_out(row, part) else "<td>"
        text += f"{_show(error['share'], '.2g')}</td>"
    text += f'<td class="l call">{escape(call_title(row, names))}</td>' if names else ""
    return f"{text}</tr>"


def _show(value: float | None, style: str = ".1e") -> str:
    return f"{value:{style}}" if finite_or_inf(value) < float("inf") else "not finite"


def call_title(row: RowEntry, names: Sequence[str]) -> str:
    """Return the number and the name of a row's call."""
    return f"call {row['call']}, {names[row['call']]}"


def css_class(status: str) -> str:
    """Return the page's CSS class for a row's status."""
    return "unmeasured" if status in UNMEASURED else escape(status)
