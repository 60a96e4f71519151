"""The page of the grid: docs/grid.md, and docs/grid.html, which loads nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from llama_common.files import write_text

from . import markdown
from .causes import Cause
from .cells import COLUMNS, Cell, Column, State, cell, used_causes
from .results import tried_without_port
from .sections import cause_section, package_section
from .style import STYLE

FIRST_OF_LOADER = [column.title for column in COLUMNS].index("loader")
Rows = list[tuple[dict[str, Any], list[Cell]]]


def write(results: Sequence[dict[str, Any]], causes: Sequence[Cause], docs: Path) -> None:
    """Write both pages."""
    ran = [result for result in results if result["runs"]]
    rows = [(result, [cell(result, column, causes) for column in COLUMNS]) for result in ran]
    not_run = [result for result in results if not result["runs"]] + tried_without_port()
    write_text(docs / "grid.md", markdown.document(rows, not_run, causes))
    write_text(docs / "grid.html", document(rows, not_run, causes))


def document(rows: Rows, not_run: Sequence[dict[str, Any]], causes: Sequence[Cause]) -> str:
    """Return the page."""
    used = used_causes((cells for _, cells in rows), causes)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Who computes Llama</title><style>{STYLE}</style></head><body><main>",
        "<h1>Who computes Llama</h1>",
        f'<p class="lead">{escape(markdown.INTRODUCTION)}</p>',
        _legend(),
        _table(rows),
        _questions(),
    ]
    if used:
        parts.append("<h2>What is red, and why</h2>")
        parts += [cause_section(cause, rows) for cause in used]
    parts.append("<h2>The packages</h2>")
    parts += [package_section(result, cells) for result, cells in rows]
    if not_run:
        parts.append('<h2>Not run</h2><ul class="plain">')
        for result in not_run:
            name, why = escape(result["name"]), escape(result["not_run"])
            parts.append(f"<li><b>{name}</b>: {why}</li>")
        parts.append("</ul>")
    return "\n".join([*parts, "</main></body></html>"]) + "\n"


def _legend() -> str:
    items = "".join(
        f'<li><span class="{_class(state)}">{state.sign}</span> {escape(state.words)}</li>'
        for state in State
    )
    return f'<ul class="legend">{items}</ul>'


def _table(rows: Rows) -> str:
    heads = "".join(
        f'<th scope="col" title="{escape(column.question)}">'
        f"<span>{escape(column.title)}</span></th>"
        for column in COLUMNS
    )
    body = "".join(_row(result, cells) for result, cells in rows)
    return (
        '<div class="scroll" tabindex="0"><table><thead>'
        f'<tr><th rowspan="2" scope="col">package</th>'
        f'<th class="group" colspan="{FIRST_OF_LOADER}">computation, weights mapped</th>'
        f'<th class="group" colspan="{len(COLUMNS) - FIRST_OF_LOADER}">its own loader</th></tr>'
        f"<tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(result: dict[str, Any], cells: Sequence[Cell]) -> str:
    name = escape(result["name"])
    version = escape(markdown.version_of(result))
    tds = "".join(_cell(column, one) for column, one in zip(COLUMNS, cells, strict=True))
    return (
        f'<tr><th scope="row"><a href="#{name}">{name}</a> '
        f'<span class="soft">{version}</span></th>{tds}</tr>'
    )


def _cell(column: Column, one: Cell) -> str:
    words = [f"{column.title}: {one.state.words}", f"{one.compared} examples compared"]
    if one.compared and one.share is not None:
        words.append(f"largest error {one.share:.2g} of its tolerance")
    words += one.notes[:4]
    sign = one.state.sign
    if one.cause is not None:
        sign = f'<a href="#{one.cause.anchor}">{sign}</a>'
    title, label = escape("\n".join(words)), escape("; ".join(words[:2]))
    about = f'title="{title}" aria-label="{label}"'
    return f'<td class="{_class(one.state)}" {about}>{sign}</td>'


def _class(state: State) -> str:
    return f"cell {state.name.lower()}"


def _questions() -> str:
    items = "".join(
        f"<dt>{escape(column.title)}</dt><dd>{escape(column.question)}</dd>" for column in COLUMNS
    )
    return f'<details><summary>The columns</summary><dl class="columns">{items}</dl></details>'
