"""Predict training's speed on many GPUs: ``python tools/predict.py``, without a GPU.

The first table has, for each number of GPUs and way to share a step, the bytes that a GPU sends and
the tokens/s between the best case and the worst; the second what was measured beside the same. The
assumptions are in tools/benchmarks/scaling_model.py.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while modules are imported: see llama_common/interrupt.py. cli.run takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from llama_common import cli
from llama_common.errors import check

MOST = 1 << 20  # GPUs, and windows of one


@dataclass(frozen=True)
class PredictConfig:
    """Predict the speed of training on many GPUs from the speed of one and of the links."""

    command: ClassVar[str] = "python tools/predict.py"

    shape: Literal["default", "15m", "124m", "135m", "1.1b", "7b"] = "1.1b"
    """The model."""
    windows: int = 8
    """Windows of the model's whole context that each GPU has of a step."""
    speed: float = 74_000
    """Tokens per second of one GPU alone, measured with as many windows (tools/scaling.py)."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs."""
    per_host: int = 8
    """GPUs of a host."""
    nvlink: float = 450
    """GB/s of a GPU to the others of its host, each way."""
    network: float = 400
    """Gb/s of a GPU to other hosts, each way."""

    def __post_init__(self) -> None:
        for name in ("windows", "per_host"):
            value = getattr(self, name)
            check(1 <= value <= MOST, name, value, f"must lie between 1 and {MOST}")
        for name in ("speed", "nvlink", "network"):
            value = getattr(self, name)
            check(0 < value < math.inf, name, value, "must be positive and finite")
        between = f"must each lie between 1 and {MOST}"
        check(all(1 <= number <= MOST for number in self.gpus), "gpus", self.gpus, between)
        whole = f"must each be below --per-host {self.per_host}, or a multiple of it"
        fit = all(n < self.per_host or n % self.per_host == 0 for n in self.gpus)
        check(fit, "gpus", self.gpus, whole)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(PredictConfig, argv)
    print(*table(PREDICTED, predicted_rows(config)), sep="\n")
    print(*("", *table(COMPARED, compared_rows())), sep="\n")
    return 0


PREDICTED = "GPUs", "layout", "a GPU sends", "moving", "a step", "tokens/s", "of N times one"
COMPARED = "measured", "layout", "tokens/s", "best case", "worst case", "best case is off by"


def predicted_rows(config: PredictConfig) -> Iterator[Sequence[str]]:
    """Yield the cells of each number of GPUs and layout."""
    from tools.benchmarks import scaling_model as model  # imports torch
    from tools.shapes import SHAPES

    machines = model.Machines(config.per_host, config.nvlink * 1e9, config.network * 1e9 / 8)
    work = model.Work(SHAPES[config.shape], config.windows, config.speed)
    for gpus in config.gpus:
        for mesh in model.meshes(work.model, gpus, config.per_host):
            found = model.predict(work, mesh, machines)
            share, worst = (
                speed / gpus / config.speed for speed in (found.speed, found.worst_speed)
            )
            yield (
                *(f"{gpus}", name_of(mesh), f"{sum(found.sent.values()) / 1e9:.1f} GB"),
                *(f"{1000 * found.moving:.0f} ms", f"{1000 * found.seconds:.0f} ms"),
                *(f"{found.worst_speed:,.0f} to {found.speed:,.0f}", f"{worst:.0%} to {share:.0%}"),
            )


def compared_rows() -> Iterator[Sequence[str]]:
    """Yield the cells of each measured run."""
    from tools.benchmarks import scaling_model as model

    for row in model.MEASURED:
        found = model.predicted(row)
        yield (
            *(f"{row.shape}, {row.mesh.size} GPUs", name_of(row.mesh), f"{row.speed:,}"),
            *(f"{found.speed:,.0f}", f"{found.worst_speed:,.0f}"),
            f"{found.speed / row.speed - 1:+.1%}",
        )


def name_of(mesh: tuple[int, int, int]) -> str:
    """Return a layout in words: replicas, shards, tensor parallelism."""
    names = zip(("DDP", "FSDP", "TP"), mesh, strict=True)
    return " x ".join(f"{name} {n}" for name, n in names if n > 1) or "one process"


def table(headings: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for cells in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
