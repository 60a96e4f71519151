"""The training loop: steps, and what is done every so many of them."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch.profiler import profile, schedule

from ..common.device import pick_device
from ..common.errors import Breach
from ..common.torchrun import is_launched
from ..config import TrainConfig
from ..data.corpus import describe
from ..data.loader import StepSampler, train_batches, val_batches
from ..distributed.parallel import Parallel
from ..model.llama import Llama
from . import compile as speedup
from .bad_steps import Guard
from .batch import Batch, splitter
from .optimizer import learning_rate
from .progress import Progress, Silence
from .saver import make_saver
from .setup import pick_dtype, prepare
from .signals import Stop, Stopped, signals
from .step import train_step
from .tensorboard import Board
from .throughput import flops_per_token, peak_flops
from .validate import evaluate, sample

TRACE_FILE = "trace.json"

TRACED_STEPS = 3


def train(config: TrainConfig) -> float:
    """Run ``config`` to its end, resuming where it says so; return the last validation loss.

    Raises Stopped when SIGINT or SIGTERM ends it before.
    """
    with ExitStack() as held:
        return _train(config, held, held.enter_context(signals(hears_twice=is_launched())))


def _train(config: TrainConfig, held: ExitStack, stop: Stop) -> float:
    context, out = config.model.max_seq_len, Path(config.out)
    device = pick_device(config.device)
    parallel = Parallel.of(config.parallel, device)
    # A run keeps the precision it began with, wherever it is resumed.
    is_bfloat16 = pick_dtype(config, device) == torch.bfloat16
    config = dataclasses.replace(config, dtype="bfloat16" if is_bfloat16 else "float32")
    if config.verify_every:
        verification().require_memory(config.model)
    rows = config.batch_size * config.grad_accum
    corpus, model, optimizer, start, skipped = prepare(config, device, parallel, held)
    split = splitter(config)
    windows = train_batches(
        corpus,
        context,
        seed=config.seed,
        rows=rows,
        first=start,
        last=config.steps,
        workers=config.data.num_workers,
        rank=parallel.data_rank,
        world=parallel.data_size,
    )
    held_out = val_batches(corpus, context, config.batch_size, config.eval_batches)
    is_compiled = speedup.prepare(model, config)
    n_parameters = sum(p.numel() for p in model.parameters())
    at_peak = parallel.world * peak_flops(device, getattr(torch, config.dtype))
    at_peak /= flops_per_token(config.model, n_parameters)
    sampler = StepSampler(corpus, context, config.seed, rows, start, config.steps)
    guard = Guard(config, device, sampler.describe, skipped)
    # All processes judge alike; the first says why they end.
    accept, look = (
        parallel.errors_on_main_only()(guard.accept),
        parallel.errors_on_main_only()(guard.look),
    )
    saver = make_saver(
        Path(config.out), model, optimizer, parallel, config.keep_last, config.keep_best
    )
    progress: Progress | Silence = Silence()
    with ExitStack() as shown:
        if parallel.is_main_process:
            board = shown.enter_context(Board(out / "tensorboard", start + 1 if start else 0))
            speed = rows * context, device, at_peak
            progress = shown.enter_context(Progress(board, start, config.steps, *speed))
        traced = shown.enter_context(tracing(config, progress))
        shown.callback(windows.close)  # and with it the processes that prepare them
        progress.say(describe(corpus))
        progress.say(
            f"{n_parameters:,} parameters, {config.dtype} on {device}, "
            f"{rows * context:,} tokens a step, run directory {out}"
        )
        if config.keep_best and parallel.is_sharded:
            progress.say("best/ is not kept: no process holds the whole model")
        if start:
            progress.say(f"continuing after step {start}")
        val_loss = evaluate(model, held_out, split, parallel)
        if not start:
            progress.validated(start, val_loss)
        stop.deferred = True
        for step, window in enumerate(windows, start):
            done = step + 1
            batches = [split(part) for part in window.split(config.batch_size)]
            lr, began = learning_rate(step, config.steps, config.optim), time.perf_counter()
            loss, norm = train_step(
                model,
                optimizer,
                batches,
                lr=lr,
                grad_clip=config.optim.grad_clip,
                z_loss=config.optim.z_loss,
                accept=partial(accept, done),
                parallel=parallel,
            )
            asked = parallel.all_reduce_max(stop.asked)
            last = done == config.steps
            progress.advance(done)
            traced()
            if is_compiled and step == start:
                loss.item()  # waits
                progress.compiled(done, time.perf_counter() - began)
            if skipped and skipped[-1] == done:
                progress.skipped(done, loss.item(), norm.item(), len(skipped))
            if last or done % config.log_every == 0:
                for saved in saver.completed():
                    progress.saved(saved)
                look()
                progress.trained(done, loss.item(), lr, norm.item())
            if (
                config.verify_every
                and parallel.is_main_process
                and (last or done % config.verify_every == 0)
            ):
                look()
                verify(model, batches, config, done, progress)
            if last or done % config.eval_every == 0:
                look()
                val_loss = evaluate(model, held_out, split, parallel)
                progress.validated(done, val_loss)
                saver.validated(done, val_loss)
            if config.sample_every and (last or done % config.sample_every == 0):
                progress.sampled(done, sample(model, config, done, parallel))
            if last or asked or done % config.save_every == 0:
                look()
                for saved in saver.save(done, skipped, waits=last or asked > 0):
                    progress.saved(saved)
                if asked and not last:
                    raise Stopped(asked, done)
        saver.export()
        if skipped:
            progress.say(f"{len(skipped)} bad steps skipped: {', '.join(map(str, skipped))}")
    return val_loss


def verify(
    model: Llama,
    batches: Sequence[Batch],
    config: TrainConfig,
    done: int,
    progress: Progress | Silence,
) -> None:
    """Compare the model with the oracle; raise Breach where it computes something else."""
    oracle = verification()
    measures = oracle.check(model, batches, config.optim.z_loss)
    worst = oracle.nearest(measures)
    progress.verified(done, {name: (found.error, found.bound) for name, found in worst.items()})
    if not all(measure.holds for measure in measures):
        raise Breach(oracle.complaint(measures, Path(config.out), done))


def verification() -> ModuleType:
    """Import what compares with the oracle, and the oracle with it: for --verify-every alone."""
    from . import verify

    return verify


@contextmanager
def tracing(config: TrainConfig, progress: Progress | Silence) -> Iterator[Callable[[], None]]:
    """With --profile, write a trace of some steps; yield what is to be called after each."""
    if not config.profile or isinstance(progress, Silence):
        yield lambda: None
        return
    path = Path(config.out) / TRACE_FILE

    def save(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        progress.say(f"trace of {TRACED_STEPS} steps in {path}; ui.perfetto.dev opens it")

    # The first steps compile and allocate.
    wait = max(0, min(5, config.steps - TRACED_STEPS - 1))
    when = schedule(wait=wait, warmup=1, active=TRACED_STEPS, repeat=1)
    # One cycle, so that acc_events changes nothing but a warning that events are not added up.
    with profile(schedule=when, on_trace_ready=save, acc_events=True) as profiler:
        yield profiler.step
