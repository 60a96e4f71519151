"""``--dry-run``: estimate memory, disk and time of a run from a few of its training steps."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from llama_common.memory import gib

from ..config import RunConfig
from .clock import UNKNOWN_SPEED, speed_of
from .setup import Run, setup
from .step import train_step
from .task import Task
from .throughput import peak_memory, peak_tokens_per_second
from .validate import measure as measure_loss
from .validate import sample_text

FEWEST, MOST = 7, 25  # steps that are timed
SECONDS = 8.0  # of them together, where MOST steps take longer
SAMPLES = 3
SCATTERED = 2.0  # ratio of the 90th percentile of step times to the 10th
WRITTEN = 1 << 25  # bytes written to learn the disk's speed


def report(config: RunConfig, task: Task | None = None) -> int:
    """Print parameters, memory, disk and time of a run; return the exit code. Leaves no file."""
    with ExitStack() as exit_stack:
        run = setup(config, exit_stack, task)
        print(*run.source.describe(), run.summary, sep="\n")
        config = run.config
        seconds_each, times = measure(run)
    if scatter := describe_scatter(seconds_each):
        print(scatter)
    seconds_per_step = statistics.median(seconds_each)
    dtype = run.model.head_weight.dtype
    windows = run.source.example_windows().split(config.batch_size)
    tokens = sum(run.source.to_batch(rows).tokens.numel() for rows in windows)
    at_peak = peak_tokens_per_second(
        run.multiplied, run.n_parameters, run.device, dtype, run.source.learnt_share
    )
    # One checkpoint more while it is written.
    bytes_kept = 12 * (config.keep_last + 1) + 4 * (1 + config.keep_best)
    speed = speed_of(tokens, seconds_per_step, at_peak)
    print(f"{speed:,.0f} tokens/s, MFU {speed / at_peak:.1%}" if speed else UNKNOWN_SPEED)
    print(f"memory at most {gib(peak_memory(run.device), 2)}")
    print(f"checkpoints take {bytes_kept * run.n_parameters / 1e9:.2f} GB of disk")
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
    print(f"time {sum(times.values()):.0f} s: {parts}")
    return 0


def measure(run: Run) -> tuple[list[float], dict[str, float]]:
    """Time training steps at a learning rate of 0; return their seconds, and the run's by part."""
    config, optim = run.config, run.config.optim
    windows = run.source.example_windows()

    def step() -> Tensor:
        batches = [run.source.to_batch(rows) for rows in windows.split(config.batch_size)]
        given = run.model, run.optimizer, batches
        clip, objective = optim.grad_clip, run.objective
        return train_step(*given, lr=0.0, grad_clip=clip, objective=objective)[0]

    first = _seconds(step)
    warm = _seconds(step)
    each = _seconds_each(step, run.device, max(FEWEST, min(MOST, int(SECONDS / warm))))
    per_step = statistics.median(each)
    verifying = sampling = 0.0
    if config.verify_every:
        from .verify import check  # imports the oracle

        batches = [run.source.to_batch(rows) for rows in windows.split(config.batch_size)]
        verifying = _seconds(lambda: check(run.model, batches, 0.0))
    if config.sample_every:
        sample = partial(sample_text, run.model, run.source.prompt, config.seed, 0)
        sampling = _median_seconds(sample)
    validating = _validation_seconds(run)
    # A checkpoint is the weights and both moments in float32; the weights again are the model.
    disk_speed = _disk_speed(Path(config.out))
    saving, exporting = (n * run.n_parameters / disk_speed for n in (16, 4))
    return each, {
        "steps": config.steps * per_step,
        "the first step's preparation": max(0.0, first - per_step),
        "validation": (1 + _times(config.steps, config.eval_every)) * validating,
        "verification": _times(config.steps, config.verify_every) * verifying,
        "samples": _times(config.steps, config.sample_every) * sampling,
        "checkpoints": _times(config.steps, config.save_every) * saving
        + _times(config.steps, config.eval_every) * exporting * config.keep_best,
    }


def describe_scatter(seconds: Sequence[float]) -> str:
    """Return a line on step times that scatter, "" where they do not.

    A tenth at either end does not count.
    """
    quickest, *_, slowest = statistics.quantiles(seconds, n=10, method="inclusive")
    if slowest < SCATTERED * quickest:
        return ""
    return (
        f"steps took {min(seconds):.2g} to {max(seconds):.2g} s: is the machine busy? "
        f"The times below are of the median, {statistics.median(seconds):.2g} s"
    )


def _validation_seconds(run: Run) -> float:
    """Return the seconds of one validation: the median batch's, times their number."""
    windows = run.validation().windows
    shown = windows[:FEWEST]
    given = run.source.to_batch, None, run.objective
    measure_loss(run.model, shown[:1], *given)
    each = [_seconds(partial(measure_loss, run.model, [one], *given)) for one in shown]
    return statistics.median(each) * len(windows)


def _times(steps: int, every: int) -> int:
    """Return the number of times an action every ``every`` steps runs; ``every`` 0 = never."""
    return -(-steps // every) if every else 0


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    made = call()
    if isinstance(made, Tensor):
        made.item()  # waits
    return time.perf_counter() - start


def _median_seconds(call: Callable[[], object]) -> float:
    return statistics.median(_seconds(call) for _ in range(SAMPLES))


def _seconds_each(step: Callable[[], Tensor], device: torch.device, number: int) -> list[float]:
    """Return the seconds of each of ``number`` steps; a GPU is not waited for between them."""
    if device.type != "cuda":
        return [_seconds(step) for _ in range(number)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [one.elapsed_time(other) / 1000 for one, other in pairwise(marks)]


def _disk_speed(out: Path) -> float:
    """Return the write speed of the run's disk, in bytes per second."""
    while not out.is_dir():
        out = out.parent
    with tempfile.TemporaryFile(dir=out) as file:
        data, start = bytes(WRITTEN), time.perf_counter()
        file.write(data)
        file.flush()
        return WRITTEN / (time.perf_counter() - start)
