"""Draw the plots of a comparison's HTML page, as SVG."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from operator import itemgetter
from typing import Any

import numpy as np

from reference_np.ops import Array

from .html_tables import MOST_TOKENS, call_title, css_class, rows_table
from .report_rows import (
    PARTS,
    STATUSES,
    RowEntry,
    counted,
    escape,
    finite_or_inf,
    group_by,
    is_out,
    judged_kl,
    rms_of,
    worst_row,
)

Axes = Any  # matplotlib is optional

LOOKS = {"inherited": ("#3584e4", "o"), "fresh": ("#e08a1e", "D")}  # colour, marker

COLOURS = ("#3584e4", "#e08a1e", "#2aa876", "#9a6dd7", "#d6579b", "#7a8a99")  # on white and black

RED = "#e01b24"

INK = "#010203"  # replaced by the page's text colour, light or dark

RC: dict[Any, Any] = {
    "svg.hashsalt": "llama",  # ids do not vary from run to run
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


class Decades:
    """A vertical log axis of at most ``most`` decades, with zero below the lowest of them."""

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
        if lowest:  # no tick where its label is
            self.ticks = [tick for tick in self.ticks if tick - self.low > step / 2] + [self.low]
        self.labels = [_power(tick) for tick in self.ticks]
        self.labels[-1] = lowest or self.labels[-1]

    def heights(self, values: Array | Sequence[float]) -> Array:
        """Return log10 of the values, at least the lowest on the axis; NaN where not finite."""
        array = np.asarray(values, dtype=np.float64)
        array = np.where(np.isfinite(array), array, np.nan)
        return np.maximum(np.log10(np.maximum(array, 1e-300)), self.low)

    def apply(self, axes: Axes, first: int, last: int) -> None:
        """Set this as the vertical axis of a plot over ``first`` to ``last``."""
        margin = 0.4 + (last - first) / 50
        axes.set_xlim(first - margin, last + margin)
        axes.set_ylim(self.low, self.high)
        axes.set_yticks(self.ticks, self.labels)
        axes.grid(alpha=0.15, linewidth=0.6)

    def cross(self, axes: Axes, places: Array) -> None:
        """Draw crosses at the top, for values that are not finite."""
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
    """Return the figure as an <svg> element; ``name`` is a prefix that makes its ids unique."""
    file = StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    axes.figure.savefig(file, format="svg", metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    role = f'role="img" aria-label="{escape(label)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: role, svg, count=1)


def depth_section(rows: Sequence[RowEntry], names: Sequence[str]) -> str:
    """Return a plot over the layers for every activation kind, and a table of the other kinds."""
    if not rows:
        return ""
    layered = [row for row in rows if row["layer"] is not None]
    others = [row for row in rows if row["layer"] is None]
    measured = [row[part] for row in layered for part in PARTS if row[part]]
    scale = Decades(finite_or_inf(e["rms"]) for error in measured for e in (error, error["bound"]))
    legend = "".join(
        f'<li><i style="color: {LOOKS[part][0]}"></i>{part} error</li><li>'
        f'<i style="color: {LOOKS[part][0]}; border-top-style: dashed"></i>its bound</li>'
        for part in PARTS
    )
    plots = ""
    for number, (kind, of_kind) in enumerate(group_by(layered, itemgetter("kind")).items()):
        layers = group_by(of_kind, itemgetter("layer")).values()
        axes = _figure(3.6, 1.9)
        for part in PARTS:
            _draw_errors(axes, scale, part, [worst_row(calls, (part,)) for calls in layers])
        scale.apply(axes, layered[0]["layer"], max(row["layer"] for row in layered))
        axes.set_xlabel("layer")
        counts = Counter(status for calls in layers for status in {r["status"] for r in calls})
        bad = [s for s in STATUSES[:-1] if counts[s]]
        listed = ", ".join(f'<span class="{css_class(s)}">{s} in {counts[s]}</span>' for s in bad)
        state = f"{listed} of {len(layers)}" if bad else '<span class="ok">ok</span>'
        plots += f'<figure><figcaption><b><code>{escape(kind)}</code></b><span class="soft">'
        svg = _svg(axes, f"depth{number}", f"errors of {kind}")
        plots += f"{state}</span></figcaption>{svg}</figure>"
    worst = [worst_row(calls, PARTS) for calls in group_by(others, itemgetter("kind")).values()]
    unit = '<p class="soft">logits.kl is the KL of the worst token, in nats.</p>'
    unit = unit if any(row["kind"] == "logits.kl" for row in others) else ""
    outside = f"{unit}{rows_table(worst, PARTS, names)}"
    if not layered:
        return f"<h2>Outside the layers</h2>{outside}"
    return (
        '<h2>Error by depth</h2><p class="soft">Inherited: the activation as it is, with the '
        "errors of everything before it. Fresh: what its own operation adds. Root mean square, "
        "the worst of all calls. A point is out of bound if its rms, its worst element or its "
        f'worst token is.</p><ul class="legend">{legend}<li><b>●</b>out of bound</li>'
        "<li><b>✕</b>missing, misshapen, not finite or in another order</li></ul>"
        f'<div class="grid">{plots}</div>'
        f"<h3>Outside the layers</h3>{outside}"
    )


def _draw_errors(axes: Axes, scale: Decades, part: str, rows: Sequence[RowEntry]) -> None:
    """Draw one error of one activation kind, and its bound, over the layers of ``rows``."""
    colour, marker = LOOKS[part]
    layers = np.array([row["layer"] for row in rows])
    errors = scale.heights([rms_of(row[part]) for row in rows])
    bounds = scale.heights([rms_of(row[part] and row[part]["bound"]) for row in rows])
    out = np.array([is_out(row, part) for row in rows])
    alone = "_" if len(layers) == 1 else ""  # a line of one point does not show
    axes.plot(layers, bounds, color=colour, ls="--", lw=0.9, marker=alone, ms=12)
    axes.plot(layers, errors, color=colour, lw=1.1, marker=marker, ms=2.2)
    axes.plot(layers[out], errors[out], marker, color=RED, ms=3.2, clip_on=False)
    scale.cross(axes, layers[out & np.isnan(errors)])


def predictions_section(report: Mapping[str, Any]) -> str:
    """Return the plot of KL by token: a line for a long call, a point for a decode step."""
    calls, logits = report["calls"], report["logits"]
    if not logits:
        return ""
    roots: list[int] = []  # by call: the first of the calls that it continues
    starts: list[int] = []  # by call: its first position
    for number, call in enumerate(calls):
        after = call["after"]
        roots.append(number if after is None else roots[after])
        starts.append(0 if after is None else starts[after] + len(calls[after]["tokens"][0]))
    scale = Decades(value for entry in logits for value in judged_kl(entry))
    axes, legend = _figure(4.2, 2.4), ""
    for i, (root, entries) in enumerate(group_by(logits, lambda e: roots[e["call"]]).items()):
        colour = COLOURS[i % len(COLOURS)]
        for entry in entries:
            for row in entry["kl"]:
                judged = [i for i, value in enumerate(row) if value is not None]
                heights = scale.heights([row[i] for i in judged])
                positions = starts[entry["call"]] + np.array(judged)
                marker = "o" if len(judged) == 1 else ""
                axes.plot(positions, heights, color=colour, lw=1, marker=marker, ms=3)
        kl = [value for entry in entries for value in judged_kl(entry)]
        more = f", then {counted(len(entries) - 1, 'more call')}" if len(entries) > 1 else ""
        worst = f"at most {max(kl):.1e} nats"
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


def heat_map_section(heat_map: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """Return the heat map of the first diverging activation's errors [T, cells]; "" for none."""
    if heat_map is None or not heat_map["error"]:
        return ""
    error = np.array([[finite_or_inf(value) for value in row] for row in heat_map["error"]])
    tokens, per_cell = len(error), heat_map["channels_per_cell"]
    step = math.ceil(tokens / MOST_TOKENS)
    error = np.maximum.reduceat(error, range(0, tokens, step), axis=0)
    scale = Decades(error.flat, most=8)
    axes = _figure(4.2, 2.8)
    image = axes.imshow(
        scale.heights(error),
        cmap="viridis",
        vmin=scale.low,
        vmax=scale.high,
        aspect="auto",
        interpolation="none",
        extent=(0, heat_map["channels"], tokens, 0),
    )
    axes.set_facecolor(RED)  # shows where there is no finite error
    axes.set(xlabel="channel", ylabel="token")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, label="relative error")
    bar.set_ticks(scale.ticks, labels=scale.labels)
    bar.outline.set_visible(False)
    cell = f"A cell is {counted(per_cell, 'channel')} of {counted(step, 'token')}. "
    red = "Red: not finite." if np.isinf(error).any() else ""
    return (
        f'<section><h2>The first divergence</h2><p class="soft"><code>{escape(heat_map["name"])}'
        f"</code> ({escape(call_title(heat_map, names))}, row {heat_map['row']}). "
        f"{cell if max(per_cell, step) > 1 else ''}{red}</p>"
        f"{_svg(axes, 'heat', 'errors by token and channel')}</section>"
    )
