"""Print a comparison's report (schema llama-compare/2) on a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_common.errors import printable

from . import engine_report
from .report_rows import (
    RowEntry,
    coverage_sentences,
    inheriting_rows,
    judged_kl,
    short_name,
    wrong_rows,
)

Say = Callable[..., None]  # prints a line, in a style
SHOWN = 16  # rows of a table unless all are asked for


def print_report(report: Mapping[str, Any], console: Console, everything: bool) -> None:
    """Print a report: rows, the bugs that explain them, the verdict.

    Without ``everything``, rows within their bounds are left out.
    """

    def say(text: str, **style: Any) -> None:
        console.print(printable(text), soft_wrap=True, markup=False, **style)

    say(report["title"])
    names = [call["name"] for call in report["calls"]]
    for line in coverage_sentences(report):
        say(line, style="yellow")
    _table(report["rows"], names, console, everything)
    _say_distances(report, everything, say)
    training = report["training"]
    if training is not None:
        for line in training["notes"]:
            say(line, style="yellow")
        _table(training["rows"], [], console, everything)
    for part in (report, training or {}):
        for finding in part.get("diagnosis", ()):
            say(finding["sentence"], style="bold yellow")
        if part.get("unexplained"):
            say(
                f"No known bug explains {part['unexplained']} of {part['diverging']} divergences.",
                style="bold yellow",
            )
    first = report["first_divergence"]
    if first is not None and first["where"]:
        say(f"At {first['name']} ({names[first['call']]}) the error is {first['where']}.")
    if report["warnings"]:
        say(report["warnings"], style="yellow")
    holds = report["verdict"]["holds"]
    say(report["verdict"]["line"], style="bold green" if holds else "bold red")


def _say_distances(report: Mapping[str, Any], everything: bool, say: Say) -> None:
    """Print how far logits and log-probabilities are from the oracle's."""
    judged = [np.array(judged_kl(entry)) for entry in report["logits"]]
    longest = max((kl.size for kl in judged), default=0)
    for entry, kl in zip(report["logits"], judged, strict=True):
        if everything or entry["changed"] or kl.size == longest:
            say(
                f"logits of {entry['name']}: KL {_nats(kl.mean())} nats per token, "
                f"{_nats(kl.max())} at worst; first choice differs at {entry['changed']} of "
                f"{kl.size} positions"
            )
    for line in engine_report.sentences(report):
        say(line)


def _nats(divergence: float) -> str:
    return f"{divergence:.1e}" if divergence else "0"


def _table(
    rows: Sequence[RowEntry], names: Sequence[str], console: Console, everything: bool
) -> None:
    """Print errors beside their bounds; without ``everything``, those of the first wrong rows."""
    wrong, inherits = wrong_rows(rows), inheriting_rows(rows)
    shown = list(rows) if everything else (wrong or inherits)[:SHOWN]
    if not shown:
        return
    fresh = any(row["fresh"] for row in shown)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("activation" if names else "training step", overflow="fold")
    if names:
        table.add_column("call", overflow="ellipsis", no_wrap=True, max_width=20)
    for heading in ("inherited", "bound", *(("fresh", "bound") if fresh else ()), "of bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    styles = {"ok": None, "inherits": "yellow", "documented": "yellow"}
    for row in shown:
        parts = [row["inherited"], *([row["fresh"]] if fresh else [])]
        cells = [short_name(row)]
        cells += [escape(printable(names[row["call"]]))] if names else []
        for part in parts:
            cells += [_short(part and part["rms"]), _short(part and part["bound"]["rms"])]
        shares = [part["share"] for part in parts if part and part["share"] is not None]
        cells.append(f"{max(shares):.2g}" if shares else "")
        table.add_row(*cells, row["status"], style=styles.get(row["status"], "bold red"))
    console.print(table)
    left = [f"{len(wrong) - len(shown)} more like these"] if len(wrong) > len(shown) else []
    left += [f"{len(inherits)} inherit an error"] if wrong and inherits else []
    if left and not everything:
        console.print(f"... and {', '.join(left)}; --all shows everything", style="dim")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
