"""Print the tables of training and of the other works."""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .timing import Setup, SpeedRow
from .training import TrainRow


def show(rows: Sequence[SpeedRow | TrainRow], setup: Setup) -> None:
    """Print the tables of training and of the other works."""
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else "CPU"
    title = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    title += f", median of {setup.repeats}"
    console = Console(highlight=False)
    console.width = max(console.width, 100) if not console.is_terminal else console.width
    if trained := [row for row in rows if isinstance(row, TrainRow)]:
        console.print(training_table(trained, title))
    if others := [row for row in rows if isinstance(row, SpeedRow)]:
        console.print(inference_table(others, title))


def training_table(rows: Sequence[TrainRow], title: str) -> Table:
    """Return the table of training."""
    headings = "work", "shape", "dtype", "ours", "MFU", "GiB", "peer", "peer's", "its GiB", "ratio"
    table = new_table(title, headings)
    for row in rows:
        table.add_row(
            *(row.work, row.shape, row.dtype, speed(row.ours)),
            *("-" if row.mfu is None else f"{row.mfu:.1%}", gib(row.memory)),
            *(row.peer, speed(row.peer_speed), gib(row.peer_memory)),
            "" if row.ratio is None else f"{row.ratio:.2f}",
        )
    table.caption = "ours and peer's in tokens/s; GiB at most" + (
        "; -: not measured, see above" if any(None in row for row in rows) else ""
    )
    return table


def inference_table(rows: Sequence[SpeedRow], title: str) -> Table:
    """Return the table of the other works."""
    headings = "work", "shape", "dtype", "ours", "peer", "peer's", "ratio", "of limit"
    table = new_table(title, headings)
    for row in rows:
        table.add_row(
            *(row.work, row.shape, row.dtype, speed(row.ours), row.peer),
            "not installed" if row.peer_speed is None else speed(row.peer_speed),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.limit is None else f"{row.limit:.0%}",
        )
    missing = any(row.peer_speed is None for row in rows)
    install = escape("; what is not installed: pip install -e '.[test,bench]'")
    table.caption = "ours and peer's in tokens/s" + (install if missing else "")
    return table


def new_table(title: str, headings: Sequence[str]) -> Table:
    """Return a table without rows; columns of words are aligned left, of numbers right."""
    table = Table(title=title)
    for heading in headings:
        left = heading in ("work", "shape", "dtype", "peer")
        table.add_column(heading, justify="left" if left else "right")
    return table


def speed(tokens_per_second: float | None) -> str:
    """Return a speed as text with three digits or more; "-" for None."""
    if tokens_per_second is None:
        return "-"
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f}"


def gib(size: int | None) -> str:
    """Return a number of bytes as text, in GiB; "-" for None."""
    return "-" if size is None else f"{size / 2**30:.2f}"
