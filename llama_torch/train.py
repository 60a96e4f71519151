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
from .packing import pack_documents
from .progress import Progress
from .step import Batch, split_window, train_step
from .stopping import Stop, Stopped, signals
from .text import Gpt2
from .throughput import flops_per_token, peak_flops
from .tokenizer import VOCAB_SIZE, gpt2

TRACE_FILE = "trace.json"
TRACED_STEPS = 3


@torch.no_grad()
def evaluate(
    model: Llama, windows: Sequence[Tensor], split: Callable[[Tensor], Batch] = split_window
) -> float:
    """Return the mean loss in nats per token over ``windows``, each int64 [B, T + 1]."""
    device = model.head_weight.device
    total, n_valid = torch.zeros((), dtype=torch.float64, device=device), 0
    with speedup.uncompiled():
        for window in windows:
            batch = split(window)
            n_valid += count_valid(batch.targets)
            tokens, targets, positions, mask = batch.to(device)
            hidden, _ = model.model(tokens, positions=positions, mask=mask)
            total += loss_sum(hidden, model.head_weight, targets)
    return total.item() / n_valid


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the precision of weights and activations."""
    automatic = "bfloat16" if computes_bfloat16(device) else "float32"
    found: torch.dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
    return found


def set_up(config: TrainConfig, device: torch.device) -> tuple[Llama, Optimizer]:
    """Build the model with its seeded initial weights, and its optimizer."""
    torch.set_float32_matmul_precision(config.matmul_precision)
    model = Llama(config.model)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(device)
    return model, make_adamw(model, config.optim, pick_dtype(config, device))


def prepare(
    config: TrainConfig, device: torch.device, held: ExitStack
) -> tuple[Corpus, Llama, Optimizer, int, list[int]]:
    """Load text, model and optimizer, and claim or restore the run, whose lock ``held`` keeps.

    Returns the number of steps done and those skipped too. What can be refused is refused
    before the work that it would waste.
    """
    out = Path(config.out)
    if config.resume:
        run_dir.require_same(config)
        held.enter_context(run_dir.lock(out))
    corpus = load_corpus(config.data, config.model.vocab_size, config.model.max_seq_len)
    if config.resume:
        run_dir.require_same(config, corpus.key)
    model, optimizer = set_up(config, device)
    if config.resume:
        return corpus, model, optimizer, *run_dir.restore(out, model, optimizer)
    held.enter_context(run_dir.lock(out))
    run_dir.claim(config, corpus.key)
    return corpus, model, optimizer, 0, []


def train(config: TrainConfig) -> float:
    """Run ``config`` to its end, resuming where it says so; return the last validation loss.

    Raises Stopped when SIGINT or SIGTERM ends it before.
    """
    with ExitStack() as held:
        return _train(config, held, held.enter_context(signals()))


def _train(config: TrainConfig, held: ExitStack, stop: Stop) -> float:
    context, out = config.model.max_seq_len, Path(config.out)
    device = pick_device(config.device)
    # A run keeps the precision it began with, wherever it is resumed.
    is_bfloat16 = pick_dtype(config, device) == torch.bfloat16
    config = dataclasses.replace(config, dtype="bfloat16" if is_bfloat16 else "float32")
    if config.verify_every:
        verification().require_memory(config.model)
    corpus, model, optimizer, start, skipped = prepare(config, device, held)
    rows = config.batch_size * config.grad_accum
    split = pack_documents if config.data.pack_documents else split_window
    windows = train_batches(
        corpus,
        context,
        seed=config.seed,
        rows=rows,
        first=start,
        last=config.steps,
        workers=config.data.num_workers,
    )
    held_out = val_batches(corpus, context, config.batch_size, config.eval_batches)
    is_compiled = speedup.prepare(model, config)
    n_parameters = sum(p.numel() for p in model.parameters())
    at_peak = peak_flops(device, getattr(torch, config.dtype))
    at_peak /= flops_per_token(config.model, n_parameters)
    sampler = StepSampler(corpus, context, config.seed, rows, start, config.steps)
    guard = Guard(config, device, sampler.describe, skipped)
    best = run_dir.best_loss(out)
    with (
        Board(out / "tensorboard", start + 1 if start else 0) as board,
        Progress(board, start, config.steps, rows * context, device, at_peak) as progress,
        tracing(config, progress) as traced,
    ):
        progress.say(describe(corpus))
        progress.say(
            f"{n_parameters:,} parameters, {config.dtype} on {device}, "
            f"{rows * context:,} tokens a step, run directory {out}"
        )
        if start:
            progress.say(f"continuing after step {start}")
        val_loss = evaluate(model, held_out, split)
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
                accept=partial(guard.accept, done),
            )
            last = done == config.steps
            progress.advance(done)
            traced()
            if is_compiled and step == start:
                loss.item()  # waits
                progress.compiled(done, time.perf_counter() - began)
            if skipped and skipped[-1] == done:
                progress.skipped(done, loss.item(), norm.item(), len(skipped))
            if last or done % config.log_every == 0:
                guard.look()
                progress.trained(done, loss.item(), lr, norm.item())
            if config.verify_every and (last or done % config.verify_every == 0):
                guard.look()
                verify(model, batches, config, done, progress)
            if last or done % config.eval_every == 0:
                guard.look()
                val_loss = evaluate(model, held_out, split)
                progress.validated(done, val_loss)
                if config.keep_best and val_loss < best:
                    run_dir.save_best(out, model, optimizer, done, val_loss)
                    best = val_loss
            if config.sample_every and (last or done % config.sample_every == 0):
                progress.sampled(done, sample(model, config, done))
            if last or stop.asked or done % config.save_every == 0:
                guard.look()
                run_dir.save(out, model, optimizer, done, skipped, config.keep_last)
                progress.saved(done)
                if stop.asked and not last:
                    raise Stopped(stop.asked, done)
        if skipped:
            progress.say(f"{len(skipped)} bad steps skipped: {', '.join(map(str, skipped))}")
    return val_loss


def verify(
    model: Llama, batches: Sequence[Batch], config: TrainConfig, done: int, progress: Progress
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
def tracing(config: TrainConfig, progress: Progress) -> Iterator[Callable[[], None]]:
    """With --profile, write a trace of some steps; yield what is to be called after each."""
    if not config.profile:
        yield lambda: None
        return
    path = Path(config.out) / TRACE_FILE

    def save(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        progress.say(f"trace of {TRACED_STEPS} steps in {path}; ui.perfetto.dev opens it")

    # The first steps compile and allocate.
    wait = max(0, min(5, config.steps - TRACED_STEPS - 1))
    when = schedule(wait=wait, warmup=1, active=TRACED_STEPS, repeat=1)
    with profile(schedule=when, on_trace_ready=save, with_stack=False) as profiler:
        yield profiler.step


def sample(model: Llama, config: TrainConfig, step: int) -> str:
    """Write 40 tokens after the sample prompt; the draw is a function of (seed, step)."""
    if config.model.vocab_size < VOCAB_SIZE:
        return "(no sample: the vocabulary is smaller than the encoding's)"
    prompt = gpt2().encode_ordinary(config.sample_prompt)[: config.model.max_seq_len - 1]
    settings = SamplingConfig(max_new_tokens=40, seed=config.seed * 1_000_003 + step)
    with speedup.uncompiled():
        # A captured step would keep its cache in a GPU's memory between samples.
        ids = generate(model, prompt, settings, decoding="eager")
        return config.sample_prompt + Gpt2().decode(ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = run_dir.resolve_config(argv)
    if config.dry_run:
        return dry_run.report(config)
    started = time.perf_counter()
    try:
        val_loss = train(config)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        print(_farewell(stopped, config.out), file=sys.stderr)
        return 128 + stopped.signum
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
    command = f"python -m llama_torch.train --resume --out {shlex.quote(out)}"
    return f"stopped by {name}; continue {saved} with: {command}"


if __name__ == "__main__":
    sys.exit(main())
