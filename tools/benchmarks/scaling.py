"""Measure training on several processes of one host beside one of them, for scaling.py."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from llama_torch.common.device import pick_device
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training.throughput import flops_per_token

from ..shapes import SHAPES
from .scaling_config import ScalingConfig
from .scaling_side import Job, Result
from .tables import gib, speed
from .training import ROOT
from .works import BATCHES

ALONE = "one process"
SHARDED_ONLY = {"7b"}  # one GPU of those in use does not hold float32 weights, gradients, moments
COLUMNS = "shape", "precision", "layout", "processes"
NUMBERS = "tokens/s", "each", "MFU", "GiB", "times one", "loss differs"


class Layout(NamedTuple):
    """How the processes of a job share a step; those that the two numbers leave are replicas."""

    name: str
    processes: int
    fsdp: int
    tp: int


class ScalingRow(NamedTuple):
    """One row of the table; speeds in tokens/s, memory in bytes a process. None: it failed."""

    shape: str
    precision: str
    layout: str
    processes: int
    device: str | None
    speed: float | None
    mfu: float | None
    memory: int | None
    ratio: float | None  # speed, as a multiple of one process's; None: one is not measured
    loss_difference: float | None  # the largest, relative, of a step from one process's
    losses: Sequence[float]


def measure(config: ScalingConfig) -> list[ScalingRow]:
    """Run the job of every row, one process first; return the rows.

    A row's speed is printed on stderr as soon as it is known, and a job's error in one line: what
    was measured before an interruption is seen.
    """
    on_cuda = pick_device(config.device).type == "cuda"
    processes = config.processes or (torch.cuda.device_count() if on_cuda else 2)
    rows: list[ScalingRow] = []
    for shape in config.shapes:
        each = config.batch_size or BATCHES.get(shape, 4)
        for precision in config.precisions:
            name = precision_name(config.dtype, precision)
            alone: Result | None = None
            for layout in layouts(config, shape, precision, processes):
                job = make_job(config, shape, precision, layout, each, processes)
                title = f"{shape}, {name}, {layout.name}"
                result = run_job(job, layout, title)
                if layout.name == ALONE:
                    alone = result
                rows.append(make_row(shape, name, layout, job, result, alone))
                if rows[-1].speed is not None:
                    told = f"scaling: {title}: {rows[-1].speed:,.0f} tokens/s"
                    print(told, file=sys.stderr, flush=True)
    return rows


def precision_name(dtype: str, precision: str) -> str:
    """Return the precision of the blocks' products."""
    return "fp8" if precision == "fp8" else dtype


def layouts(config: ScalingConfig, shape: str, precision: str, processes: int) -> Iterator[Layout]:
    """Yield one process, then the layouts that were asked for, or that suit the shape."""
    yield Layout(ALONE, 1, 1, 1)
    has_tp = precision != "fp8"
    every = {
        "ddp": Layout("DDP", processes, 1, 1),
        "fsdp": Layout(f"FSDP {processes}", processes, processes, 1),
        "tp": Layout(f"TP {processes}", processes, 1, processes),
        "fsdp-tp": Layout(f"FSDP {processes // 2} x TP 2", processes, processes // 2, 2),
    }
    if shape in SHARDED_ONLY:
        suits = ["fsdp"]
    else:
        suits = ["ddp", "fsdp"] + (["tp"] if is_divided(SHAPES[shape], processes) else [])
        suits += ["fsdp-tp"] if processes % 2 == 0 and processes > 2 else []
    for name in config.layouts or suits:
        if has_tp or every[name].tp == 1:
            yield every[name]


def is_divided(model: ModelConfig, tp: int) -> bool:
    """Return whether tensor parallelism over ``tp`` processes has whole heads and hidden units."""
    return all(n % tp == 0 for n in (model.n_heads, model.n_kv_heads, model.hidden_dim))


def make_job(
    config: ScalingConfig, shape: str, precision: str, layout: Layout, each: int, processes: int
) -> Job:
    """Return the job of a layout, with ``each`` windows a step for each process.

    One process takes the windows of all ``processes`` in steps whose losses count, in several
    micro-batches, and its own share alone in timed ones. A tensor-parallel group takes the windows
    of its processes in one micro-batch.
    """
    rows = each * processes
    return Job(
        model=SHAPES[shape],
        device=config.device,
        dtype=config.dtype,
        precision=precision,
        fsdp=layout.fsdp,
        tp=layout.tp,
        rows=rows,
        micro_rows=each * layout.tp,
        timed=each * layout.processes,
        steps=config.steps,
        result="",
    )


def run_job(job: Job, layout: Layout, title: str) -> Result | None:
    """Run a job under torchrun, or alone in a process; return its result, or None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(layout.processes)]
        command = [*(launcher if layout.processes > 1 else []), "-m"]
        command += ["tools.benchmarks.scaling_side", job._replace(result=str(result)).text()]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and result.exists():
            return Result(**json.loads(result.read_text(encoding="utf-8")))
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line) for line in done.stderr.strip().splitlines()]
    named = [line for line in lines if re.match(r"(error: |[\w.]+(Error|Exception)\b)", line)]
    why = (named or lines or [f"ended with {done.returncode}"])[0]
    print(f"scaling: {title}: {why}", file=sys.stderr)
    return None


def make_row(
    shape: str,
    precision: str,
    layout: Layout,
    job: Job,
    result: Result | None,
    alone: Result | None,
) -> ScalingRow:
    """Return a job's row, beside the job of one process."""
    named = shape, precision, layout.name, layout.processes
    if result is None:
        return ScalingRow(*named, None, None, None, None, None, None, [])
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in Llama(job.model).parameters())
    tokens_per_second = job.timed * job.model.max_seq_len / result.seconds
    peak = layout.processes * result.peak_flops / flops_per_token(job.model, n_parameters)
    ratio = difference = None
    if alone is not None and layout.name != ALONE:
        own = job.timed / layout.processes * job.model.max_seq_len / alone.seconds
        ratio = tokens_per_second / own
        pairs = zip(result.losses, alone.losses, strict=True)
        difference = max(abs(loss - other) / abs(other) for loss, other in pairs)
    return ScalingRow(
        *named,
        result.device,
        tokens_per_second,
        tokens_per_second / peak,
        result.peak_bytes,
        ratio,
        difference,
        result.losses,
    )


def table(rows: Sequence[ScalingRow]) -> Table:
    """Return the table of all rows."""
    devices = sorted({row.device for row in rows if row.device})
    made = Table(title=f"{', '.join(devices)}, torch {torch.__version__}")
    for heading in COLUMNS:
        made.add_column(heading)
    for heading in NUMBERS:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(
            *(row.shape, row.precision, row.layout, str(row.processes)),
            *(speed(row.speed), speed(row.speed and row.speed / row.processes)),
            *("-" if row.mfu is None else f"{row.mfu:.1%}", gib(row.memory)),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.loss_difference is None else f"{row.loss_difference:.1e}",
        )
    made.caption = "GiB of a process; loss differs: at most, from one process's on the same windows"
    return made
