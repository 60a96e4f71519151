"""``--dry-run``: what a run will take, measured on a few of its own steps."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..common.device import pick_device
from ..config import TrainConfig
from ..data.corpus import describe, load_corpus
from ..data.loader import val_batches
from . import compile as speedup
from .batch import splitter
from .step import train_step
from .throughput import flops_per_token, peak_flops, peak_memory

WARM_UP, STEPS = 2, 5
WRITTEN = 1 << 25  # bytes written to learn the disk's speed


def report(config: TrainConfig) -> int:
    """Print parameters, memory and time; return the exit code. Leaves no file."""
    from .loop import verification  # which offers this as a flag
    from .setup import set_up
    from .validate import evaluate, sample

    device = pick_device(config.device)
    context, batch_size = config.model.max_seq_len, config.batch_size
    corpus = load_corpus(config.data, config.model.vocab_size, context)
    print(describe(corpus))
    model, optimizer = set_up(config, device)
    dtype = model.head_weight.dtype
    speedup.prepare(model, config)
    n_parameters = sum(p.numel() for p in model.parameters())
    rows = batch_size * config.grad_accum
    print(
        f"{n_parameters:,} parameters, {str(dtype).removeprefix('torch.')} on {device}, "
        f"{rows * context:,} tokens a step"
    )
    generator = torch.Generator().manual_seed(config.seed)
    window = torch.randint(config.model.vocab_size, (rows, context + 1), generator=generator)

    split = splitter(config)

    def step() -> Tensor:
        batches = [split(part) for part in window.split(batch_size)]
        clip = config.optim.grad_clip
        return train_step(
            model, optimizer, batches, lr=0.0, grad_clip=clip, z_loss=config.optim.z_loss
        )[0]

    first = _seconds(step)
    for _ in range(WARM_UP - 1):
        step().item()
    each = _seconds(*[step] * STEPS) / STEPS
    held_out = val_batches(corpus, context, batch_size, config.eval_batches)
    evaluate(model, held_out[:1], split)
    validation = _seconds(lambda: evaluate(model, held_out, split))
    verifying = 0.0
    if config.verify_every:
        batches = [split(part) for part in window.split(batch_size)]
        verifying = _seconds(lambda: len(verification().check(model, batches, 0.0)))
    sampling = _seconds(lambda: sample(model, config, 0)) if config.sample_every else 0.0
    # A checkpoint is the weights and both moments in float32; the weights again are the model.
    disk_speed = _disk_speed(Path(config.out))
    saving, exporting = 16 * n_parameters / disk_speed, 4 * n_parameters / disk_speed
    kept = 12 * (config.keep_last + 1) + 4 * (1 + config.keep_best)  # one more while it is written
    times = {
        "steps": config.steps * each,
        "the first step's preparation": max(0.0, first - each),
        "validation": (1 + -(-config.steps // config.eval_every)) * validation,
        "verification": -(-config.steps // config.verify_every) * verifying if verifying else 0.0,
        "samples": -(-config.steps // config.sample_every) * sampling if sampling else 0.0,
        "checkpoints": -(-config.steps // config.save_every) * saving
        + -(-config.steps // config.eval_every) * exporting * config.keep_best,
    }
    speed = rows * context / each
    at_peak = peak_flops(device, dtype) / flops_per_token(config.model, n_parameters)
    print(f"{speed:,.0f} tokens/s, MFU {speed / at_peak:.1%}")
    print(f"memory at most {peak_memory(device) / 2**30:.2f} GiB")
    print(f"checkpoints take {kept * n_parameters / 1e9:.2f} GB of disk")
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
    print(f"time {sum(times.values()):.0f} s: {parts}")
    return 0


def _seconds(*calls: Callable[[], Tensor | float | str]) -> float:
    start = time.perf_counter()
    for call in calls:
        made = call()
    if isinstance(made, Tensor):
        made.item()  # waits
    return time.perf_counter() - start


def _disk_speed(out: Path) -> float:
    """Return the bytes per second that the run's disk takes."""
    while not out.is_dir():
        out = out.parent
    with tempfile.TemporaryFile(dir=out) as file:
        data, start = bytes(WRITTEN), time.perf_counter()
        file.write(data)
        file.flush()
        return WRITTEN / (time.perf_counter() - start)
