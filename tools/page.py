"""Draw a comparison's report as one HTML page that loads nothing else (extra: plot)."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from llama_torch.common.errors import InputError
from reference_np.ops import Array
from tools.differences import REORDERED

Row = Mapping[str, Any]
Axes = Any  # matplotlib is optional

PARTS = ("inherited", "fresh")
LOOKS = {"inherited": ("#3584e4", "o"), "fresh": ("#e08a1e", "D")}
COLOURS = ("#3584e4", "#e08a1e", "#2aa876", "#9a6dd7", "#d6579b", "#7a8a99")  # on white and black
RED = "#e01b24"
UNMEASURED = ("missing", "not finite", "misshapen", REORDERED)
STATUSES = ("diverges", *UNMEASURED, "inherits", "ok")  # the order of what to say first
MOST_FAILED, MOST_ROWS, MOST_TOKENS = 200, 2000, 512

INK = "#010203"  # stands for the page's text colour, light or dark
RC: dict[Any, Any] = {
    "svg.hashsalt": "llama",  # the same report is the same page
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}

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
.ok { color: var(--good); } .inherits { color: var(--warn); }
.diverges, .unmeasured { color: var(--bad); font-weight: 600; }
summary { cursor: pointer; margin: .8rem 0; }
"""


def page(report: Mapping[str, Any]) -> str:
    """Return the report (schema llama-compare/1) as one HTML page."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("--html needs matplotlib; pip install 'llama-parity[plot]'") from None
    line, names = escape(report["verdict"]["line"]), [call["name"] for call in report["calls"]]
    with mpl.rc_context(RC):
        body = (
            f"{_findings(report, names)}{_depth(report['rows'], names)}"
            f'<div class="grid pair">{_predictions(report)}{_heatmap(report["heatmap"], names)}'
            f"</div><h2>Activations</h2>{_rows(report['rows'], PARTS, names)}"
        )
    if report["training"] is not None:
        rows = _rows(report["training"]["rows"], PARTS[:1], ())
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


def _findings(report: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return what is wrong in words, and what was compared."""
    training = report["training"] or {"diagnosis": [], "unexplained": 0, "notes": []}
    text = _diagnosis(report, "") + _diagnosis(training, "Training step: ")
    if (first := report["first_divergence"]) is not None:
        where = [part for part in (first["operation"], first["where"]) if part]
        text += f"<p><b>First divergence:</b> <code>{escape(first['name'])}</code>, "
        text += f"{escape(', '.join(where))} ({escape(_call(first, names))})</p>"
    for name, covers in zip(names, report["coverage"], strict=True):
        if covers == "logits":
            text += _note(f"{name}: only the logits are offered")
        elif covers != "activations":
            text += _note(f"{name}: {covers}")
    notes = (report["warnings"], *training["notes"])
    text += "".join(_note(note) for note in notes if note)
    (begin, end), n_layers = report["layers"], report["n_layers"]
    layers = _count(n_layers, "layer")
    if (begin, end) != (0, n_layers):
        layers = f"layers {begin} to {end - 1} of {n_layers}"
    tokens = sum(len(row) for call in report["calls"] for row in call["tokens"])
    return (
        f'{text}<p class="soft"><code>{escape(report["checkpoint"])}</code>: oracle against '
        f"<code>{escape(report['against'])}</code>, {escape(report['dtype'])}, {layers}, "
        f"{_count(len(names), 'call')}, {_count(tokens, 'token')}. "
        "Errors are relative to the exact value.</p>"
    )


def _note(text: str) -> str:
    return f'<p class="inherits">{escape(text)}</p>'


def _diagnosis(part: Mapping[str, Any], where: str) -> str:
    """Return the known bugs that explain what diverges, and how much none explains."""
    said = [found["sentence"] for found in part["diagnosis"]]
    if part["unexplained"]:
        rows = _count(part["unexplained"], "diverging row")
        said.append(f"None of the known bugs explains {rows}.")
    return "".join(f'<p class="bug">{where}{escape(sentence)}</p>' for sentence in said)


# --- Plots ---


class Decades:
    """A log axis that has room for zero: heights are log10; zero is below the lowest decade."""

    def __init__(self, values: Iterable[float], most: int = 24) -> None:
        values = [value for value in values if value < math.inf]
        logs = [math.log10(value) for value in values if value > 0] or [-9.0, 0.0]
        self.high = max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
        self.low = max(math.floor(min(logs)), self.high - most)
        lowest = f"≤{_power(self.low)}" if min(logs) < self.low else ""
        if not lowest and any(value <= 0 for value in values):
            self.low, lowest = self.low - 1, "0"
        step = math.ceil((self.high - self.low) / 5)
        self.ticks = list(range(self.high, self.low - 1, -step))
        if lowest:  # makes way for its label
            self.ticks = [tick for tick in self.ticks if tick - self.low > step / 2] + [self.low]
        self.labels = [_power(tick) for tick in self.ticks]
        self.labels[-1] = lowest or self.labels[-1]

    def heights(self, values: Array | Sequence[float]) -> Array:
        """Return where to draw the values; NaN for those that are not finite."""
        array = np.asarray(values, dtype=np.float64)
        array = np.where(np.isfinite(array), array, np.nan)
        return np.maximum(np.log10(np.maximum(array, 1e-300)), self.low)

    def apply(self, axes: Axes, first: int, last: int) -> None:
        """Make this the vertical axis, over ``first`` to ``last``."""
        margin = 0.4 + (last - first) / 50
        axes.set_xlim(first - margin, last + margin)
        axes.set_ylim(self.low, self.high)
        axes.set_yticks(self.ticks, self.labels)
        axes.grid(alpha=0.15, linewidth=0.6)

    def cross(self, axes: Axes, places: Array) -> None:
        """Mark what has no height, at the top."""
        axes.plot(places, np.full(len(places), self.high), "x", color=RED, ms=4, clip_on=False)


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _figure(width: float, height: float) -> Axes:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure
    from matplotlib.ticker import MaxNLocator

    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    return axes


def _svg(axes: Axes, name: str, label: str) -> str:
    """Return the figure as an <svg> element; ``name`` keeps its ids apart from the others'."""
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    axes.figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    size = f'role="img" aria-label="{escape(label)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: size, svg, count=1)


def _depth(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Return a plot over the layers for every activation kind, and a table of the other kinds."""
    if not rows:
        return ""
    layered = [row for row in rows if row["layer"] is not None]
    others = [row for row in rows if row["layer"] is None]
    found = [row[part] for row in layered for part in PARTS if row[part]]
    scale = Decades(_number(e["rms"]) for error in found for e in (error, error["bound"]))
    legend = "".join(
        f'<li><i style="color: {LOOKS[part][0]}"></i>{part} error</li><li>'
        f'<i style="color: {LOOKS[part][0]}; border-top-style: dashed"></i>its bound</li>'
        for part in PARTS
    )
    plots = ""
    for number, (kind, of_kind) in enumerate(_grouped(layered, "kind").items()):
        layers = _grouped(of_kind, "layer").values()
        axes = _figure(3.6, 1.9)
        for part in PARTS:
            _draw_errors(axes, scale, part, [_worst(calls, (part,)) for calls in layers])
        scale.apply(axes, layered[0]["layer"], max(row["layer"] for row in layered))
        axes.set_xlabel("layer")
        counts = Counter(status for calls in layers for status in {r["status"] for r in calls})
        bad = [s for s in STATUSES[:-1] if counts[s]]
        said = ", ".join(f'<span class="{_css(s)}">{s} in {counts[s]}</span>' for s in bad)
        state = f"{said} of {len(layers)}" if bad else '<span class="ok">ok</span>'
        plots += f'<figure><figcaption><b><code>{escape(kind)}</code></b><span class="soft">'
        picture = _svg(axes, f"depth{number}", f"errors of {kind}")
        plots += f"{state}</span></figcaption>{picture}</figure>"
    worst = [_worst(calls, PARTS) for calls in _grouped(others, "kind").values()]
    unit = '<p class="soft">logits.kl is the KL of the worst token, in nats.</p>'
    unit = unit if any(row["kind"] == "logits.kl" for row in others) else ""
    return (
        '<h2>Error by depth</h2><p class="soft">Inherited: the activation as it is, with the '
        "errors of everything before it. Fresh: what its own operation adds. Root mean square, "
        "the worst of all calls. A point is out of bound if its rms, its worst element or its "
        f'worst token is.</p><ul class="legend">{legend}<li><b>●</b>out of bound</li>'
        "<li><b>✕</b>missing, misshapen, not finite or in another order</li></ul>"
        f'<div class="grid">{plots}</div>'
        f"<h3>Outside the layers</h3>{unit}{_table(worst, PARTS, names)}"
    )


def _draw_errors(axes: Axes, scale: Decades, part: str, rows: Sequence[Row]) -> None:
    """Draw one error of one activation kind, a row for every layer, and its bound."""
    colour, marker = LOOKS[part]
    layers = np.array([row["layer"] for row in rows])
    errors = scale.heights([_rms(row[part]) for row in rows])
    bounds = scale.heights([_rms(row[part] and row[part]["bound"]) for row in rows])
    out = np.array([_is_out(row, part) for row in rows])
    alone = "_" if len(layers) == 1 else ""  # a line of one point does not show
    axes.plot(layers, bounds, color=colour, ls="--", lw=0.9, marker=alone, ms=12)
    axes.plot(layers, errors, color=colour, lw=1.1, marker=marker, ms=2.2)
    axes.plot(layers[out], errors[out], marker, color=RED, ms=3.2, clip_on=False)
    scale.cross(axes, layers[out & np.isnan(errors)])


def _predictions(report: Mapping[str, Any]) -> str:
    """Return the plot of KL by token: a line for a long call, a point for a decode step."""
    calls, logits = report["calls"], report["logits"]
    if not logits:
        return ""
    roots: list[int] = []  # of every call: the first of those whose cache it continues
    starts: list[int] = []  # and its first position
    for number, call in enumerate(calls):
        after = call["after"]
        roots.append(number if after is None else roots[after])
        starts.append(0 if after is None else starts[after] + len(calls[after]["tokens"][0]))
    scale = Decades(_number(value) for entry in logits for row in entry["kl"] for value in row)
    axes, legend = _figure(4.2, 2.4), ""
    for i, (root, entries) in enumerate(_grouped(logits, lambda e: roots[e["call"]]).items()):
        colour = COLOURS[i % len(COLOURS)]
        for entry in entries:
            for row in entry["kl"]:
                heights = scale.heights([_number(value) for value in row])
                positions = starts[entry["call"]] + np.arange(len(row))
                marker = "o" if len(row) == 1 else ""
                axes.plot(positions, heights, color=colour, lw=1, marker=marker, ms=3)
                scale.cross(axes, positions[np.isnan(heights)])
        kl = [_number(value) for entry in entries for row in entry["kl"] for value in row]
        more = f", then {_count(len(entries) - 1, 'more call')}" if len(entries) > 1 else ""
        worst = f"at most {max(kl):.1e} nats" if max(kl) < math.inf else "not finite"
        legend += f'<li><i style="color: {colour}"></i>{escape(calls[root]["name"])}{more}: {worst}'
        legend += f"; first choice differs at {sum(e['changed'] for e in entries)} of {len(kl)}"
        legend += "</li>"
    scale.apply(axes, 0, max(starts[e["call"]] + len(row) - 1 for e in logits for row in e["kl"]))
    axes.set(xlabel="token of the sequence", ylabel="KL (nats)")
    return (
        '<section><h2>Predictions by token</h2><p class="soft">KL from the oracle\'s '
        "distribution to the implementation's. A point is a call of one token.</p>"
        f'{_svg(axes, "kl", "KL by token")}<ul class="legend">{legend}</ul></section>'
    )


def _heatmap(found: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """Return the picture of the first diverging tensor's errors [T, cells]."""
    if found is None or not found["error"]:
        return ""
    error = np.array([[_number(value) for value in row] for row in found["error"]])
    tokens, per_cell = len(error), found["channels_per_cell"]
    step = math.ceil(tokens / MOST_TOKENS)
    error = np.maximum.reduceat(error, range(0, tokens, step), axis=0)
    scale = Decades(error.flat, most=8)
    axes = _figure(4.2, 2.8)
    picture = axes.imshow(
        scale.heights(error),
        cmap="viridis",
        vmin=scale.low,
        vmax=scale.high,
        aspect="auto",
        interpolation="none",
        extent=(0, found["channels"], tokens, 0),
    )
    axes.set_facecolor(RED)  # shows where there is no finite error
    axes.set(xlabel="channel", ylabel="token")
    bar = axes.figure.colorbar(picture, ax=axes, pad=0.02, label="relative error")
    bar.set_ticks(scale.ticks, labels=scale.labels)
    bar.outline.set_visible(False)
    cell = f"A cell is {_count(per_cell, 'channel')} of {_count(step, 'token')}. "
    red = "Red: not finite." if np.isinf(error).any() else ""
    return (
        f'<section><h2>The first divergence</h2><p class="soft"><code>{escape(found["name"])}'
        f"</code> ({escape(_call(found, names))}, row {found['row']}). "
        f"{cell if max(per_cell, step) > 1 else ''}{red}</p>"
        f"{_svg(axes, 'heat', 'errors by token and channel')}</section>"
    )


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
