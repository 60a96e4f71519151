"""One side of the training benchmark, in a process of its own.

``python -m tools.benchmarks.training_side JOB`` takes a few steps to warm up; then, for each number
read, it times so many and prints a line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
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
from llama_torch.training.throughput import peak_flops, peak_memory

from .transformers_peer import peer_loss, plain_step, transformers_peer

WARM_UP = 3  # steps that compile, and allocate the optimizer's state
# Parameters from which float32 weights, gradients and moments (16 bytes each) leave a GPU no
# room: there the peer's loop has them all in bfloat16, as such loops have.
LARGE = 4_000_000_000
Step = Callable[[], Tensor]


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
