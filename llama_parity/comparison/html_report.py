"""Draw a comparison's report as one HTML page that loads nothing else (extra: plot)."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_common.errors import InputError

from . import engine_report
from .html_plots import RC, depth_section, heat_map_section, predictions_section
from .html_tables import call_title, rows_section
from .report_rows import PARTS, counted, coverage_sentences, escape

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --soft: #63636b; --line: #dcdce0;
  --card: #f6f6f8; --good: #1a7f37; --bad: #c01c28; --warn: #8f5300; }
@media (prefers-color-scheme: dark) { :root { --back: #17181b; --ink: #e8e8ea; --soft: #a0a0a8;
  --line: #37383d; --card: #202125; --good: #57c475; --bad: #ff7b7b; --warn: #e5a54b; } }
* { box-sizing: border-box; }
body, svg text { font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif
  !important; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  overflow-wrap: anywhere; }
h1, main { max-width: 1200px; margin: 0 auto; padding: 1.1rem 1rem; }
header { color: #fff; } .pass { background: #1a7f37; } .fail { background: #b31d28; }
h1 { font-size: clamp(1.2rem, 2.4vw, 1.75rem); line-height: 1.3; }
h2 { font-size: 1.25rem; margin: 2rem 0 .3rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, ul { margin: .4rem 0; }
code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .92em; }
.soft { color: var(--soft); font-size: .9rem; } p.soft { max-width: 54rem; }
.bug { margin: 0 0 .8rem; padding: .7rem 1rem; background: var(--card); border-radius: 4px;
  border-left: 4px solid var(--bad); font-size: clamp(1rem, 1.8vw, 1.1rem); font-weight: 600; }
.grid { display: grid; gap: 1rem 1.5rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.pair svg { max-width: 520px; margin-top: .8rem; }
figure, section { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: .6rem; align-items: baseline; }
svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; padding: 0; list-style: none;
  font-size: .9rem; }
.legend i { display: inline-block; width: 1.5em; margin-right: .4em; vertical-align: .25em;
  border-top: 2px solid; }
.legend b { margin-right: .4em; color: #e01b24; }
.scroll { overflow: auto; max-height: 34rem; margin: .6rem 0; border: 1px solid var(--line);
  border-radius: 4px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .84rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr :is(:first-child, .l) { text-align: left; } tbody tr:last-child td { border-bottom: 0; }
thead { position: sticky; top: 0; } th { background: var(--card); }
th[colspan] { text-align: center !important; } thead tr + tr th { text-align: right !important; }
td.call { max-width: 16em; overflow: hidden; text-overflow: ellipsis; }
.ok { color: var(--good); } .inherits, .documented { color: var(--warn); }
.diverges, .unmeasured { color: var(--bad); font-weight: 600; }
summary { cursor: pointer; margin: .8rem 0; }
"""


def page(report: Mapping[str, Any]) -> str:
    """Return the report (schema llama-compare/2) as one HTML page.

    Raises InputError where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("--html needs matplotlib; pip install 'llama-parity[plot]'") from None
    line, names = escape(report["verdict"]["line"]), [call["name"] for call in report["calls"]]
    with mpl.rc_context(RC):
        body = (
            f"{_summary(report, names)}{depth_section(report['rows'], names)}"
            f'<div class="grid pair">{predictions_section(report)}'
            f"{heat_map_section(report['heatmap'], names)}</div>"
        )
    if names:
        body += f"<h2>Activations</h2>{rows_section(report['rows'], PARTS, names)}"
    if report["training"] is not None:
        rows = rows_section(report["training"]["rows"], PARTS[:1], ())
        body += f"<h2>Training step</h2>{rows}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{line}</title><style>{STYLE}</style></head>
<body><header class="{"pass" if report["verdict"]["holds"] else "fail"}"><h1>{line}</h1></header>
<main>{body}</main></body></html>
"""


def _summary(report: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the diagnosis and the first divergence in words, all notes, and the inputs."""
    training = report["training"] or {"diagnosis": [], "unexplained": 0, "notes": []}
    text = _diagnosis(report, "") + _diagnosis(training, "Training step: ")
    if (first := report["first_divergence"]) is not None:
        where = [part for part in (first["operation"], first["where"]) if part]
        text += f"<p><b>First divergence:</b> <code>{escape(first['name'])}</code>, "
        text += f"{escape(', '.join(where))} ({escape(call_title(first, names))})</p>"
    notes = (
        *coverage_sentences(report),
        report["warnings"],
        *training["notes"],
        *engine_report.sentences(report),
    )
    text += "".join(_note(note) for note in notes if note)
    (begin, end), n_layers = report["layers"], report["n_layers"]
    layers = counted(n_layers, "layer")
    if (begin, end) != (0, n_layers):
        layers = f"layers {begin} to {end - 1} of {n_layers}"
    tokens = sum(len(row) for call in report["calls"] for row in call["tokens"])
    return (
        f'{text}<p class="soft"><code>{escape(report["checkpoint"])}</code>: oracle against '
        f"<code>{escape(report['against'])}</code>, {escape(report['dtype'])}, {layers}, "
        f"{counted(len(names), 'call')}, {counted(tokens, 'token')}. "
        "Errors are relative to the exact value.</p>"
    )


def _note(text: str) -> str:
    return f'<p class="inherits">{escape(text)}</p>'


def _diagnosis(part: Mapping[str, Any], where: str) -> str:
    """Return the sentences of explanations, and how many diverging rows have none.

    ``part``: the report, or its part about training; ``where``: a prefix of every sentence.
    """
    sentences = [explanation["sentence"] for explanation in part["diagnosis"]]
    if part["unexplained"]:
        rows = counted(part["unexplained"], "diverging row")
        sentences.append(f"None of the known bugs explains {rows}.")
    return "".join(f'<p class="bug">{where}{escape(sentence)}</p>' for sentence in sentences)
