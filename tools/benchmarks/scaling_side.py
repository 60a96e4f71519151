"""Take training steps in the processes of one job, for scaling.py.

``torchrun ... -m tools.benchmarks.scaling_side JOB`` takes some steps whose losses count, then as
many that are timed, and the main process writes a result to the job's file.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama_common.files import write_text
from llama_torch.common.device import pick_device
from llama_torch.common.torchrun import exit_process, is_main_process
from llama_torch.config import ParallelConfig, TrainConfig
from llama_torch.distributed.job import job as joined
from llama_torch.distributed.parallel import Parallel
from llama_torch.model.config import ModelConfig
from llama_torch.model.float8_linear import use_float8
from llama_torch.training.batch import Batch, to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.setup import build
from llama_torch.training.step import train_step
from llama_torch.training.throughput import peak_flops, peak_memory

WINDOW_SETS = 4  # the steps take these sets of windows in turn, so that their losses fall


class Job(NamedTuple):
    """The settings of one job; ``rows`` windows a step over all processes, of them ``timed``."""

    model: ModelConfig
    device: str
    dtype: str
    precision: str
    fsdp: int
    tp: int
    rows: int
    micro_rows: int  # of one process in one forward pass
    timed: int  # windows in a timed step, over all processes
    steps: int
    result: str  # the file to write

    def text(self) -> str:
        """Return the job as JSON."""
        return json.dumps(self._asdict() | {"model": asdict(self.model)})

    @classmethod
    def read(cls, text: str) -> "Job":
        """Return the job that ``text`` has as JSON."""
        fields = json.loads(text)
        return cls(**(fields | {"model": ModelConfig(**fields["model"])}))


class Result(NamedTuple):
    """The measurements of a job."""

    losses: Sequence[float]
    seconds: float  # of a timed step
    peak_bytes: int  # of the process that used most
    peak_flops: float  # operations per second of one device
    device: str


def run(job: Job) -> Result:
    """Return the measurements of a job, on every one of its processes."""
    device = pick_device(job.device)
    config = TrainConfig(
        model=job.model,
        dtype=job.dtype,  # type: ignore[arg-type]
        precision=job.precision,  # type: ignore[arg-type]
        parallel=ParallelConfig(fsdp=job.fsdp, tp=job.tp),
    )
    parallel = Parallel.from_config(config.parallel, device)
    torch.set_float32_matmul_precision(config.matmul_precision)
    dtype: torch.dtype = getattr(torch, job.dtype)
    model, optimizer = build(job.model, config.optim, 0, dtype, device, parallel)
    parallel.wrap_ddp(model)
    if job.precision == "fp8":
        use_float8(model)
    compile_blocks(model, config.compile, config.recompute)

    def step(batches: Sequence[Batch]) -> Tensor:
        optim = config.optim
        return train_step(
            model,
            optimizer,
            batches,
            lr=optim.lr,
            grad_clip=optim.grad_clip,
            parallel=parallel,
        )[0]

    sets = [_batches(job, parallel, number, job.rows) for number in range(WINDOW_SETS)]
    losses = [step(sets[number % WINDOW_SETS]).item() for number in range(job.steps)]
    timed = [_batches(job, parallel, number, job.timed) for number in range(WINDOW_SETS)]
    for batches in timed:
        step(batches)
    _wait(device, parallel)
    start = time.perf_counter()
    for number in range(job.steps):
        step(timed[number % WINDOW_SETS])
    _wait(device, parallel)
    seconds = (time.perf_counter() - start) / job.steps
    memory = parallel.all_reduce_max(peak_memory(device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Result(losses, seconds, memory, peak_flops(device, dtype), name)


def _batches(job: Job, parallel: Parallel, number: int, rows: int) -> list[Batch]:
    """Return this process's micro-batches of the first ``rows`` windows of a set."""
    generator = torch.Generator().manual_seed(number)
    size = job.rows, job.model.max_seq_len + 1
    windows = torch.randint(job.model.vocab_size, size, generator=generator)[:rows]
    own = windows.chunk(parallel.data_size)[parallel.data_rank]
    return [to_batch(part) for part in own.split(job.micro_rows)]


def _wait(device: torch.device, parallel: Parallel) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    parallel.barrier()


def main() -> int:
    """Run the job of the command line; return the exit code."""
    job = Job.read(sys.argv[1])
    with joined():
        result = run(job)
    if is_main_process():
        write_text(Path(job.result), json.dumps(result._asdict()))
    return 0


if __name__ == "__main__":
    exit_process(main)
