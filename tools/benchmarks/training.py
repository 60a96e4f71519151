"""Training beside other loops: the work "train" of bench.py, each side in a process of its own.

Memory once used and code once compiled stay with a process, so a side that shared one would be
measured with another's. ``python -m tools.benchmarks.training JOB`` is such a process: it takes a
few steps to warm up; then, for each number read, it times so many and prints a line of JSON.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_torch.config import TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training.batch import to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.step import train_step
from llama_torch.training.throughput import flops_per_token, peak_flops, peak_memory

from .timing import Setup, paired
from .transformers_peer import peer_loss, plain_step, transformers_peer

ROOT = Path(__file__).resolve().parent.parent.parent
WARM_UP = 3  # steps that compile, and allocate the optimizer's state
FACTOR_CUDA = 3  # as many steps are timed on a GPU, whose steps are short
# Parameters from which float32 weights, gradients and moments (16 bytes each) leave a GPU no
# room: there the peer's loop has them all in bfloat16, as such loops have.
LARGE = 4_000_000_000
Step = Callable[[], Tensor]


class TrainRow(NamedTuple):
    """One line of the training table; speeds in tokens/s, memory in bytes. None: it failed."""

    work: str
    shape: str
    dtype: str
    ours: float | None
    mfu: float | None
    memory: int | None
    peer: str
    peer_speed: float | None
    peer_memory: int | None
    ratio: float | None


class Job(NamedTuple):
    """What one process is to do."""

    side: str
    model: ModelConfig
    batch_size: int
    dtype: str
    device: str


class Result(NamedTuple):
    """What it found in one turn."""

    seconds: Sequence[float]  # of each step
    peak_bytes: int  # until now
    loss_first: float  # of its very first step
    peak_flops: float  # operations per second of the device, now


Ask = Callable[[int], Result | None]
Found = list[Result]


def measure(setup: Setup, model: ModelConfig, batch_size: int) -> list[TrainRow]:
    """Time every side's training step; a side that fails says why on stderr, in one line.

    On a CPU, whose speed drifts, all processes live together and take a step in turn. A GPU's
    memory is for one at a time, and training there is in bfloat16, whatever ``setup`` says.
    """
    on_cuda = setup.device.type == "cuda"
    names = ON_CUDA if on_cuda else ON_CPU
    dtype = "bfloat16" if on_cuda else setup.dtype
    turns = [0, setup.repeats * FACTOR_CUDA] if on_cuda else [0, *[1] * setup.repeats]
    if on_cuda:
        torch.cuda.empty_cache()  # what earlier works left is for the sides to use
    results: dict[str, Found] = {}
    for together in [[name] for name in names] if on_cuda else [names]:
        with ExitStack() as stack:
            jobs = [Job(name, model, batch_size, dtype, setup.device.type) for name in together]
            asks = {job.side: stack.enter_context(worker(job)) for job in jobs}
            results |= take_turns(asks, turns)
        same_losses({name: found[0].loss_first for name, found in results.items()}, dtype)
    return rows(setup, model, batch_size, dtype, results)


def take_turns(asks: Mapping[str, Ask], turns: Sequence[int]) -> dict[str, Found]:
    """Have every side take so many steps in each turn; leave out a side that fails."""
    results: dict[str, Found] = {name: [] for name in asks}
    for steps in turns:
        for name in list(results):
            result = asks[name](steps)
            if result is None:
                del results[name]
            else:
                results[name].append(result)
    return results


@contextmanager
def worker(job: Job) -> Iterator[Ask]:
    """Start a side's process; yield what has it take some steps, None where it failed."""
    text = json.dumps(job._asdict() | {"model": asdict(job.model)})
    command = [sys.executable, "-m", "tools.benchmarks.training", text]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, cwd=ROOT, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors
        ) as process,
    ):
        given, replies = process.stdin, process.stdout
        assert given
        assert replies

        def ask(steps: int) -> Result | None:
            with suppress(BrokenPipeError):  # it may have ended already
                given.write(b"%d\n" % steps)
            if reply := replies.readline():
                return Result(**json.loads(reply))
            status = process.wait()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
            why = (named or lines or [f"ended with {status}"])[-1]
            print(f"train: {job.side}: {why}", file=sys.stderr)
            return None

        yield ask


def same_losses(losses: dict[str, float], dtype: str) -> None:
    """Raise RuntimeError unless all began with the same loss."""
    most = 1e-4 if dtype == "float32" else 1e-2
    ours = losses.get("ours")
    for name, loss in losses.items():
        if ours is not None and not abs(loss - ours) <= most * abs(ours):
            raise RuntimeError(
                f"train: the first loss of {name} is {loss:.6f} and ours {ours:.6f}; "
                "their speed says nothing"
            )


def rows(
    setup: Setup, model: ModelConfig, batch_size: int, dtype: str, results: Mapping[str, Found]
) -> list[TrainRow]:
    """Return a row for each peer."""
    tokens = batch_size * model.max_seq_len
    speeds = {
        name: [tokens / statistics.median(turn.seconds) for turn in found if turn.seconds]
        for name, found in results.items()
    }
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    memory = {name: found[-1].peak_bytes for name, found in results.items()}
    ours, mfu = medians.get("ours"), None
    if ours is not None:
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in Llama(model).parameters())
        peaks = [turn.peak_flops for turn in results["ours"] if turn.seconds]
        mfu = flops_per_token(model, n_parameters) * paired(speeds["ours"], peaks)
    return [
        TrainRow(
            *("train", setup.shape, dtype, ours, mfu, memory.get("ours")),
            *(peer, medians.get(peer), memory.get(peer)),
            paired(speeds["ours"], speeds[peer]) if ours and peer in speeds else None,
        )
        for peer in (ON_CUDA if setup.device.type == "cuda" else ON_CPU)
        if peer != "ours"
    ]


# The other end: one side, in the process it has to itself.


def run(job: Job) -> Iterator[Result]:
    """Yield a turn for each line read: all sides have the same first weights and tokens."""
    device = torch.device(job.device)
    config = TrainConfig(model=job.model, dtype=job.dtype)  # type: ignore[arg-type]
    torch.set_float32_matmul_precision(config.matmul_precision)
    with torch.device("meta"):
        model = Llama(job.model)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    generator, size = torch.Generator().manual_seed(1), (job.batch_size, job.model.max_seq_len + 1)
    window = torch.randint(job.model.vocab_size, size, generator=generator)
    step = SIDES[job.side](model, window, config)
    del model  # the peer's own has its tensors
    loss_first = step().item()
    for _ in range(WARM_UP - 1):
        step()
    for line in sys.stdin:
        seconds, memory = times(step, int(line), device), peak_memory(device)
        yield Result(seconds, memory, loss_first, peak_flops(device, getattr(torch, job.dtype)))


def times(step: Step, n: int, device: torch.device) -> list[float]:
    """Return the seconds of each of ``n`` steps; a GPU is not made to wait between them."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(n):
            step()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def ours(model: Llama, window: Tensor, config: TrainConfig) -> Step:
    """Return our step, set up as the trainer does."""
    optimizer = make_adamw(model, config.optim, getattr(torch, config.dtype))
    compile_blocks(model, config.compile, config.recompute)
    batches, optim = [to_batch(window)], config.optim
    return lambda: train_step(model, optimizer, batches, lr=optim.lr, grad_clip=optim.grad_clip)[0]


def transformers(model: Llama, window: Tensor, config: TrainConfig, part: str = "model") -> Step:
    """Return transformers' step; on a GPU with the model, or each of its blocks, compiled."""
    device = model.head_weight.device
    if device.type == "cuda" and sum(p.numel() for p in model.parameters()) >= LARGE:
        model.to(torch.bfloat16)
    peer = transformers_peer(model, device)
    if peer is None:
        sys.exit("transformers is not installed")
    peer.train()
    if device.type == "cuda":
        for module in [peer] if part == "model" else peer.model.layers:
            module.compile()
    return plain(peer, partial(peer_loss, peer), window, config)


def plain_loop(model: Llama, window: Tensor, config: TrainConfig, compiled: bool = False) -> Step:
    """Return the loop that is usually written around a model which returns logits."""

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits, _ = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return plain(model, torch.compile(loss) if compiled else loss, window, config)


def plain(
    model: Any, loss: Callable[[Tensor, Tensor], Tensor], window: Tensor, config: TrainConfig
) -> Step:
    """Return a plain loop's step with torch's fused AdamW."""
    optim, dtype = config.optim, getattr(torch, config.dtype)
    optimizer = make_adamw(model, optim)
    return partial(
        plain_step, loss, optimizer, window, lr=optim.lr, grad_clip=optim.grad_clip, dtype=dtype
    )


SIDES: dict[str, Callable[[Llama, Tensor, TrainConfig], Step]] = {
    "ours": ours,
    "transformers": transformers,
    "transformers, compiled": transformers,
    "transformers, blocks compiled": partial(transformers, part="blocks"),
    "plain loop": plain_loop,
    "plain loop, compiled": partial(plain_loop, compiled=True),
}
ON_CPU = ("ours", "transformers", "plain loop", "plain loop, compiled")
# Compiled as a whole, before torch 2.14, transformers' model builds a mask: no flash attention.
ON_CUDA = ("ours", "transformers, compiled", "transformers, blocks compiled")


def main(argv: Sequence[str]) -> int:
    """Do one job."""
    fields = json.loads(argv[0])
    job = Job(**(fields | {"model": ModelConfig(**fields["model"])}))
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    for result in run(job):
        print(json.dumps(result._asdict()), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
