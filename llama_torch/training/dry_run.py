"""``--dry-run``: estimate memory, disk and time of a run from a few of its training steps."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data.corpus import describe
from .setup import Run, setup
from .step import train_step
from .throughput import peak_memory, peak_tokens_per_second
from .validate import sample_text, validation_loss

WARM_UP, STEPS = 2, 5
WRITTEN = 1 << 25  # bytes written to learn the disk's speed


def report(config: TrainConfig) -> int:
    """Print parameters, memory, disk and time of a run; return the exit code. Leaves no file."""
    with ExitStack() as exit_stack:
        run = setup(config, exit_stack)
        print(describe(run.corpus))
        print(run.summary)
        seconds_per_step, times = measure(run)
    model, dtype = run.model.config, run.model.head_weight.dtype
    speed = run.tokens_per_step / seconds_per_step
    at_peak = peak_tokens_per_second(model, run.n_parameters, run.device, dtype)
    # One checkpoint more while it is written.
    bytes_kept = 12 * (config.keep_last + 1) + 4 * (1 + config.keep_best)
    print(f"{speed:,.0f} tokens/s, MFU {speed / at_peak:.1%}")
    print(f"memory at most {peak_memory(run.device) / 2**30:.2f} GiB")
    print(f"checkpoints take {bytes_kept * run.n_parameters / 1e9:.2f} GB of disk")
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
    print(f"time {sum(times.values()):.0f} s: {parts}")
    return 0


def measure(run: Run) -> tuple[float, dict[str, float]]:
    """Time training steps at a learning rate of 0; return seconds a step, and the run's by part."""
    config, optim = run.config, run.config.optim
    generator = torch.Generator().manual_seed(config.seed)
    shape = run.windows_per_step, config.model.max_seq_len + 1
    window = torch.randint(config.model.vocab_size, shape, generator=generator)

    def step() -> Tensor:
        batches = [run.to_batch(rows) for rows in window.split(config.batch_size)]
        clip, z_loss = optim.grad_clip, optim.z_loss
        return train_step(run.model, run.optimizer, batches, lr=0.0, grad_clip=clip, z_loss=z_loss)[
            0
        ]

    first = _seconds(step)
    for _ in range(WARM_UP - 1):
        step().item()
    each = _seconds(*[step] * STEPS) / STEPS
    validation = run.validation()
    validation_loss(run.model, validation.windows[:1], run.to_batch)
    validating = _seconds(validation.measure)
    verifying = sampling = 0.0
    if config.verify_every:
        from .verify import check  # imports the oracle

        batches = [run.to_batch(rows) for rows in window.split(config.batch_size)]
        verifying = _seconds(lambda: check(run.model, batches, 0.0))
    if config.sample_every:
        sampling = _seconds(lambda: sample_text(run.model, config.sample_prompt, config.seed, 0))
    # A checkpoint is the weights and both moments in float32; the weights again are the model.
    disk_speed = _disk_speed(Path(config.out))
    saving, exporting = (n * run.n_parameters / disk_speed for n in (16, 4))
    return each, {
        "steps": config.steps * each,
        "the first step's preparation": max(0.0, first - each),
        "validation": (1 + _times(config.steps, config.eval_every)) * validating,
        "verification": _times(config.steps, config.verify_every) * verifying,
        "samples": _times(config.steps, config.sample_every) * sampling,
        "checkpoints": _times(config.steps, config.save_every) * saving
        + _times(config.steps, config.eval_every) * exporting * config.keep_best,
    }


def _times(steps: int, every: int) -> int:
    """Return the number of times an action every ``every`` steps runs; ``every`` 0 = never."""
    return -(-steps // every) if every else 0


def _seconds(*calls: Callable[[], object]) -> float:
    start = time.perf_counter()
    for call in calls:
        made = call()
    if isinstance(made, Tensor):
        made.item()  # waits
    return time.perf_counter() - start


def _disk_speed(out: Path) -> float:
    """Return the write speed of the run's disk, in bytes per second."""
    while not out.is_dir():
        out = out.parent
    with tempfile.TemporaryFile(dir=out) as file:
        data, start = bytes(WRITTEN), time.perf_counter()
        file.write(data)
        file.flush()
        return WRITTEN / (time.perf_counter() - start)
