"""What the chain measured: a record for each stage and seed, their table and their picture."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llama_common.errors import InputError
from llama_common.files import atomic_write, write_text


class Measured(NamedTuple):
    """What a stage took, and where it makes a model that answers, how this one does."""

    seed: int
    stage: str
    seconds: float
    right: float | None = None  # share of right answers to the held-out questions
    reward: float | None = None  # mean score of these answers, by the seed's reward model
    turns: float | None = None  # that an instruction given in the first one lasts


class Column(NamedTuple):
    """One measure of the table and the picture."""

    name: str
    label: str
    written: Callable[[float], str]


COLUMNS = (
    Column("right", "right answers", "{:.1%}".format),
    Column("reward", "learnt reward", "{:.2f}".format),
    Column("turns", "turns an instruction lasts", "{:.2f}".format),
)


def read(path: Path) -> list[Measured]:
    """Return the records of a file, none where it is missing; InputError for one that is not."""
    if not path.exists():
        return []
    try:
        return [Measured(**record) for record in json.loads(path.read_bytes())]
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is no record of this chain ({error}); remove it") from None


def write(path: Path, found: Sequence[Measured]) -> None:
    """Write the records, whole or not at all."""
    write_text(path, json.dumps([one._asdict() for one in found], indent=1) + "\n")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values over seeds and its standard error, 0 of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def by_stage(found: Sequence[Measured], column: str) -> dict[str, list[float]]:
    """Return a measure's values over the seeds, by stage, in the order in which they ran."""
    values: dict[str, list[float]] = {}
    for one in found:
        value = getattr(one, column)
        if value is not None:
            values.setdefault(one.stage, []).append(value)
    return values


def table(found: Sequence[Measured]) -> str:
    """Return the means over seeds and their standard errors as a table in Markdown."""
    seconds = by_stage(found, "seconds")
    columns = [(column, by_stage(found, column.name)) for column in COLUMNS]
    lines = ["| stage | seeds | " + " | ".join(c.label for c in COLUMNS) + " | seconds |"]
    lines.append("| --- " * (len(COLUMNS) + 3) + "|")
    for stage, taken in seconds.items():
        cells = []
        for column, values in columns:
            mean, error = mean_and_error(values[stage]) if stage in values else (None, 0.0)
            shown = "" if mean is None else column.written(mean)
            cells.append(f"{shown} ± {column.written(error)}" if error else shown)
        cells.append(f"{statistics.fmean(taken):.0f}")
        lines.append(f"| {stage} | {len(taken)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Measured], out: Path) -> None:
    """Draw every measure by stage, with its standard error over the seeds, into ``out``."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("drawing needs matplotlib; pip install 'llama-parity[plot]'") from None
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "llama"  # ids do not vary from run to run
    import matplotlib.pyplot as plt

    figure, every_axes = plt.subplots(1, len(COLUMNS), figsize=(10, 3.2), layout="constrained")
    for axes, column in zip(every_axes, COLUMNS, strict=True):
        _draw_column(axes, by_stage(found, column.name), column)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    atomic_write(out.resolve(), partial(figure.savefig, dpi=150, metadata=metadata))


def _draw_column(axes: Any, values: dict[str, list[float]], column: Column) -> None:
    means = [mean_and_error(of_seeds) for of_seeds in values.values()]
    places = range(len(means))
    axes.errorbar(places, *zip(*means, strict=True), color="#c33", marker="o", ms=4, capsize=3)
    for place, of_seeds in zip(places, values.values(), strict=True):
        axes.plot([place] * len(of_seeds), of_seeds, ".", color="#9ab", zorder=0)
    axes.set_xticks(places, list(values), rotation=30)
    axes.set_title(column.label, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
