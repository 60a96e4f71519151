"""What the chain measured: a record for each stage and seed, and their table."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_common.errors import InputError
from llama_common.files import write_text


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
