"""Train a Llama on text: ``python -m llama_torch.train``, no arguments needed."""

import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import profile, schedule

from . import cli, dry_run, run_dir, speedup
from .batch import generate
from .board import Board
from .checkpoint import RUN_FILE
from .config import Breach, TrainConfig
from .data import Corpus, StepSampler, describe, load_corpus, train_batches, val_batches
from .device import computes_bfloat16, pick_device
from .generation_config import SamplingConfig
from .guard import Guard
from .loss import count_valid, loss_sum
from .model import Llama
from .optim import learning_rate, make_adamw
from .packing import splitter
from .parallel import (
    Parallel,
    PeerLostError,
    first_says,
    is_launched,
    is_restarted,
    is_speaker,
    job,
    leave,
    require_layout,
)
from .progress import Progress, Silence
from .step import Batch, split_window, train_step
from .stopping import Stop, Stopped, signals
from .text import Gpt2
from .throughput import flops_per_token, peak_flops
from .tokenizer import VOCAB_SIZE, gpt2_ids, located

TRACE_FILE = "trace.json"
TRACED_STEPS = 3


@torch.no_grad()
def evaluate(
    model: Llama,
    windows: Sequence[Tensor],
    split: Callable[[Tensor], Batch] = split_window,
    parallel: Parallel | None = None,
) -> float:
    """Return the mean loss in nats per token over ``windows``, each int64 [B, T + 1].

    The processes of ``parallel`` share them out, and all return the same.
    """
    parallel = parallel or Parallel()
    device = model.head_weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets
    with speedup.uncompiled():
        # Shards are gathered together: all take as many, the last ones perhaps in vain.
        for first in range(0, len(windows), parallel.data_size):
            at = first + parallel.data_rank
            batch = split(windows[min(at, len(windows) - 1)])
            tokens, targets, positions, mask = batch.to(device)
            hidden = parallel.hidden(model, tokens, positions, mask)
            loss = loss_sum(hidden, model.head_weight, targets)
            if at < len(windows):
                total += torch.stack([loss, loss.new_full((), count_valid(batch.targets))])
    parallel.reshard(model)
    loss, n_valid = parallel.total(total).tolist()
    found: float = loss / n_valid
    return found


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the precision of weights and activations."""
    automatic = "bfloat16" if computes_bfloat16(device) else "float32"
    found: torch.dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
    return found


def set_up(
    config: TrainConfig, device: torch.device, parallel: Parallel | None = None
) -> tuple[Llama, Optimizer]:
    """Build the model with its seeded initial weights, and its optimizer."""
    torch.set_float32_matmul_precision(config.matmul_precision)
    generator, dtype = torch.Generator().manual_seed(config.seed), pick_dtype(config, device)
    if parallel and parallel.is_sharded:
        model = parallel.build(config.model, dtype, generator)
        return model, make_adamw(model, config.optim)
    model = Llama(config.model)
    model.init_weights(generator)
    model.to(device)
    return model, make_adamw(model, config.optim, dtype)


def prepare(
    config: TrainConfig, device: torch.device, parallel: Parallel, held: ExitStack
) -> tuple[Corpus, Llama, Optimizer, int, list[int]]:
    """Load text, model and optimizer, and claim or restore the run, whose lock ``held`` keeps.

    Returns the number of steps done and those skipped too. What can be refused is refused
    before the work that it would waste. In a job the first process speaks to the disk.
    """
    out = Path(config.out)
    if config.resume and parallel.is_first:
        run_dir.require_same(config)
        held.enter_context(run_dir.lock(out))
    with parallel.first_goes_first():
        corpus = load_corpus(config.data, config.model.vocab_size, config.model.max_seq_len)
    if config.resume and parallel.is_first:
        run_dir.require_same(config, corpus.key)
    model, optimizer = set_up(config, device, parallel)
    start, skipped = 0, list[int]()
    if not config.resume and parallel.is_first:
        held.enter_context(run_dir.lock(out))
        run_dir.claim(config, corpus.key)
    run_dir.require_shared(out, parallel)
    if config.resume:
        with parallel.alike():
            start, skipped = run_dir.restore(out, model, optimizer, parallel)
    parallel.replicate(model)
    return corpus, model, optimizer, start, skipped


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
    accept, look = parallel.alike()(guard.accept), parallel.alike()(guard.look)
    saver = run_dir.Saver(config, model, optimizer, parallel)
    progress: Progress | Silence = Silence()
    with ExitStack() as shown:
        if parallel.is_first:
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
            asked = parallel.most(stop.asked)
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
                and parallel.is_first
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


def sample(model: Llama, config: TrainConfig, step: int, parallel: Parallel | None = None) -> str:
    """Write 40 tokens after the sample prompt; the draw is a function of (seed, step)."""
    if parallel and parallel.is_sharded:
        return "(no sample: no process holds the whole model)"
    if parallel and not parallel.is_first:
        return ""
    if config.model.vocab_size < VOCAB_SIZE:
        return "(no sample: the vocabulary is smaller than the encoding's)"
    with located("--sample-prompt"):
        prompt = gpt2_ids(config.sample_prompt)[: config.model.max_seq_len - 1]
    settings = SamplingConfig(max_new_tokens=40, seed=config.seed * 1_000_003 + step)
    with speedup.uncompiled():
        # A captured step would keep its cache in a GPU's memory between samples.
        ids = generate(model, prompt, settings, decoding="eager")
        return config.sample_prompt + Gpt2().decode(ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    try:
        with job():
            return _in_job(argv)
    except PeerLostError as error:
        if is_speaker():
            print(
                f"error: another process of this job ended ({error}); it or torchrun says why. "
                "Continue with --resume, as torchrun does by itself given --max-restarts",
                file=sys.stderr,
            )
        return 1


def _in_job(argv: Sequence[str]) -> int:
    def settle() -> TrainConfig:
        config = run_dir.resolve_config(run_dir.after_restart(argv) if is_restarted() else argv)
        require_layout(config)
        return config

    config = first_says(settle)
    if config.dry_run:
        return dry_run.report(config)
    started = time.perf_counter()
    try:
        val_loss = train(config)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if is_speaker():
            print(_farewell(stopped, config.out), file=sys.stderr)
        return 128 + stopped.signum
    if not is_speaker():
        return 0
    print(
        f"finished in {time.perf_counter() - started:.0f} s: validation loss {val_loss:.3f}, "
        f"perplexity {math.exp(val_loss):.1f}, checkpoint in {config.out}\n"
        "next:\n"
        f"  python tools/compare.py {shlex.quote(config.out + '/model.safetensors')}\n"
        f"  python -m llama_torch.generate --ckpt {shlex.quote(config.out)} "
        f"--prompt {shlex.quote(config.sample_prompt)}"
    )
    return 0


def _farewell(stopped: Stopped, out: str) -> str:
    name = signal.Signals(stopped.signum).name
    if not (Path(out) / RUN_FILE).exists():
        return f"stopped by {name} before the run began; nothing was written"
    saved = "at the last checkpoint" if stopped.saved is None else f"after step {stopped.saved}"
    launcher = "torchrun ..." if is_launched() else "python"
    command = f"{launcher} -m llama_torch.train --resume --out {shlex.quote(out)}"
    return f"stopped by {name}; continue {saved} with: {command}"


if __name__ == "__main__":
    leave(main)
