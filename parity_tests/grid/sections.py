"""Sections of the grid's HTML page: a cause of red cells, a package."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .causes import FINDINGS, Cause
from .cells import COLUMNS, Cell


def cause_section(cause: Cause, rows: Sequence[tuple[dict[str, Any], list[Cell]]]) -> str:
    """Return the section of a cause: its cells, the smallest input, and how to repeat it."""
    found = [
        (result, backend, check)
        for result, cells in rows
        for one in cells
        for backend, check, of in one.reds
        if of is cause
    ]
    result, backend, check = min(found, key=lambda red: len(str(red[2].get("failure"))))
    names = ", ".join(dict.fromkeys(f"{one['name']}:{of}" for one, of, _ in found))
    checks = ", ".join(dict.fromkeys(check["id"] for *_, check in found))
    failure = check.get("failure") or {}
    lines = [
        f'<section id="{cause.anchor}"><h3>{escape(cause.title)}</h3>',
        f'<p class="soft">{escape(names)}; {escape(", ".join(result["requires"]))}</p>',
        *(f"<p>{escape(paragraph)}</p>" for paragraph in cause.words.strip().split("\n\n")),
        f"<p>Documented: {escape(cause.documented)}.</p>" if cause.documented else "",
        f"<p>Equals the known bug <code>{escape(cause.bug)}</code>.</p>" if cause.bug else "",
        "<details><summary>The smallest input, and the checks</summary>",
        f"<pre>{escape(_smallest(failure))}</pre>",
        f'<p class="soft">{escape(checks)}</p>',
        f"<pre>{escape(_again(result['name'], backend, check['id']))}</pre></details>",
    ]
    if cause.repeat:
        lines.append(
            f"<details><summary>Without this project: <code>findings/{escape(cause.repeat)}</code>"
            f"</summary><pre>{escape((FINDINGS / cause.repeat).read_text())}</pre></details>"
        )
    if cause.code:
        lines.append(
            "<details><summary>Without this project</summary>"
            f"<pre>{escape(cause.code.strip())}</pre></details>"
        )
    return "\n".join([*lines, "</section>"])


def _smallest(failure: dict[str, Any]) -> str:
    keys = ("message", "error", "config", "call", "drawn")
    return "\n".join(f"{key:<8} {failure[key]}" for key in keys if failure.get(key))


def _again(name: str, backend: str, check: str) -> str:
    return f"llama-parity test parity_tests.ports.{name}:{backend} --check '{check}'"


def package_section(result: dict[str, Any], cells: Sequence[Cell]) -> str:
    """Return the section of a package: versions, limits, counts, and notes by column."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f'<section id="{escape(result["name"])}"><h3>{escape(result["name"])}</h3>',
        f"<p>{escape(result['title'])}.</p>",
        f'<p class="soft">{escape(versions)}</p>',
        '<ul class="plain">',
        *(_run_line(backend, run) for backend, run in result["runs"].items()),
        "</ul>",
    ]
    notes = [
        f"<li>{escape(column.title)}: {escape('; '.join(one.notes))}</li>"
        for column, one in zip(COLUMNS, cells, strict=True)
        if one.notes
    ]
    if notes:
        lines.append(f'<details><summary>Notes</summary><ul class="plain">{"".join(notes)}</ul>')
        lines.append("</details>")
    return "\n".join([*lines, "</section>"])


def _run_line(backend: str, run: dict[str, Any]) -> str:
    if "error" in run:
        return f"<li><b>{escape(backend)}</b>: no report: {escape(run['error'])}</li>"
    limits = ", ".join(f"{name} {_words(value)}" for name, value in run["limits"].items())
    over = f"; stopped by {run['over']}" if "over" in run else ""
    return (
        f"<li><b>{escape(backend)}</b>: {run['compared']} examples compared in "
        f"{', '.join(run['dtypes'])}{escape(over)}. Limits: {escape(limits or 'none')}. "
        f'<span class="soft">{escape("; ".join(run["processor"]))}</span></li>'
    )


def _words(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)
