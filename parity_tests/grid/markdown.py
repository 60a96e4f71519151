"""The page of the grid as Markdown: docs/grid.md."""

import re
from collections.abc import Sequence
from typing import Any

from .causes import Cause
from .cells import COLUMNS, Cell, State, used_causes

INTRODUCTION = (
    "The conformance suite on public packages that compute Llama: each on random small models, "
    "inside the limits that its adapter declares, against the float64 specification. A package "
    "is red where its numbers are outside the bound that rounding explains and a program without "
    "this project showed the cause. The last columns are of the package's own reading of "
    "config.json and weights. Green says that no fault was found in the examples drawn, whose "
    "number stands under The packages; a dot says nothing."
)


def document(
    rows: Sequence[tuple[dict[str, Any], list[Cell]]],
    not_run: Sequence[dict[str, Any]],
    causes: Sequence[Cause],
) -> str:
    """Return the page."""
    used = used_causes((cells for _, cells in rows), causes)
    lines = [
        "# Who computes Llama",
        "",
        "<!-- written by python -m parity_tests.grid page -->",
        "",
        f"{INTRODUCTION} [The same with details on hover](grid.html).",
        "",
        "; ".join(f"{state.sign} {state.words}" for state in State) + ".",
        "",
        f"| package | {' | '.join(column.title for column in COLUMNS)} |",
        f"| --- |{' :-: |' * len(COLUMNS)}",
        *(_row(result, cells) for result, cells in rows),
        "",
        "## The columns",
        "",
        "| column | question |",
        "| --- | --- |",
        *(f"| {column.title} | {column.question} |" for column in COLUMNS),
    ]
    if used:
        lines += ["", "## What is red, and why"]
        for cause in used:
            lines += _cause(cause)
    lines += ["", "## The packages", "", "| package | what | installed | compared | date |"]
    lines += ["| --- | --- | --- | ---: | --- |", *(_package(result) for result, _ in rows)]
    if not_run:
        lines += ["", "## Not run", "", "| package | why |", "| --- | --- |"]
        lines += [f"| {one['name']} | {_escaped(one['not_run'])} |" for one in not_run]
    return "\n".join([*lines, "", *REPEAT, ""])


REPEAT = (
    "## Repeat it",
    "",
    "```sh",
    "python -m parity_tests.grid run      # makes an environment for each package, some 40 GB",
    "python -m parity_tests.grid run mlx_lm litgpt",
    "python -m parity_tests.grid page     # writes this page from parity_tests/grid/results",
    "```",
)


def version_of(result: dict[str, Any]) -> str:
    """Return the version of the package itself, the first of what is installed."""
    return next(iter(result["versions"].values()), "")


def _row(result: dict[str, Any], cells: Sequence[Cell]) -> str:
    signs = " | ".join(_sign(one) for one in cells)
    return f"| {result['name']} {version_of(result)} | {signs} |"


def _sign(cell: Cell) -> str:
    """Return a cell's sign, linked to the cause of what is red in it."""
    sign, cause = cell.state.sign, cell.cause
    return f"[{sign}](#{_anchor(cause.title)})" if cause else sign


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _cause(cause: Cause) -> list[str]:
    shown = f"[findings/{cause.repeat}](../findings/{cause.repeat})" if cause.repeat else ""
    code = ["", "```py", cause.code.strip(), "```"] if cause.code else []
    words = " ".join(cause.words.split())
    equals = f" Equals the known bug `{cause.bug}`." if cause.bug else ""
    confirmed = f" Shown by {shown}." if shown else ""
    documented = f" Documented: {cause.documented}." if cause.documented else ""
    text = f"`{cause.port}`: {words}{documented}{equals}{confirmed}"
    return ["", f"### {cause.title}", "", text, *code]


def _package(result: dict[str, Any]) -> str:
    installed = " ".join(f"`{one}`" for one in result["requires"])
    compared = " + ".join(str(run.get("compared", 0)) for run in result["runs"].values())
    title = _escaped(result["title"])
    return f"| {result['name']} | {title} | {installed} | {compared} | {result['date']} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
