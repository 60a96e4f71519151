"""Run one side of the training benchmark, in a process of its own.

``python -m tools.benchmarks.training_side JOB`` takes a few steps to warm up; then it times as many
steps as each line of its input says, and prints a line of JSON for each.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_torch.config import TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.model.float8_linear import use_float8
from llama_torch.model.llama import Llama
from llama_torch.model.loss import IGNORE_INDEX
from llama_torch.training.batch import Batch, to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.labels import packed_batch
from llama_torch.training.optimizer import make_adamw
from llama_torch.training.step import train_step
from llama_torch.training.throughput import peak_flops, peak_memory

from .reward_sides import REWARD, TRL_REWARD, ours_on_pairs, trl_on_pairs
from .transformers_peer import peer_loss, plain_step, transformers_peer

LEARNT = 0.5  # the share of a conversation that is learnt
CONVERSATIONS = 4  # in a row of fine-tuning; the second half of each is its answer
WARM_UP = 3  # steps that compile, and allocate the optimizer's state
# From this many parameters on, float32 weights, gradients and moments (16 bytes a parameter) do not
# fit on a GPU: the peer's loop then has them all in bfloat16, as plain loops of that size do.
LARGE = 4_000_000_000
BY_DEFAULT = (
    "ours by default"  # the side that a step of ours in fp8, or with other moments, is beside
)
FINE_TUNING = "ours, on answers"  # the side that learns half of each conversation of its rows
PRETRAINING = "ours, on all tokens"
TRL = "TRL, on answers"
Step = Callable[[], Tensor]


class Job(NamedTuple):
    """The settings of one side's process."""

    side: str
    model: ModelConfig
    batch_size: int
    dtype: str
    device: str
    precision: str = "dtype"  # of the blocks' products of "ours"
    moments: str = "float32"  # of the optimizer of "ours"


class Result(NamedTuple):
    """The measurements of some steps."""

    seconds: Sequence[float]  # of each step
    peak_bytes: int  # since the start of the process
    loss_first: float  # of the first step of the process
    peak_flops: float  # operations per second of the device, measured after these steps


def run(job: Job) -> Iterator[Result]:
    """Yield a result for each line of stdin, a number of steps.

    All sides have the same initial weights and tokens.
    """
    device = torch.device(job.device)
    config = TrainConfig(model=job.model, dtype=job.dtype)  # type: ignore[arg-type]
    if job.side == "ours":
        optim = replace(config.optim, moments=job.moments)  # type: ignore[arg-type]
        config = replace(config, precision=job.precision, optim=optim)  # type: ignore[arg-type]
    torch.set_float32_matmul_precision(config.matmul_precision)
    with torch.device("meta"):
        model = Llama(job.model)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    generator, size = torch.Generator().manual_seed(1), (job.batch_size, job.model.max_seq_len + 1)
    window = torch.randint(job.model.vocab_size, size, generator=generator)
    step = SIDES[job.side](model, window, config)
    del model  # the side keeps the tensors it needs
    loss_first = step().item()
    for _ in range(WARM_UP - 1):
        step()
    for line in sys.stdin:
        seconds, memory = step_seconds(step, int(line), device), peak_memory(device)
        yield Result(seconds, memory, loss_first, peak_flops(device, getattr(torch, job.dtype)))


def step_seconds(step: Step, n: int, device: torch.device) -> list[float]:
    """Return the seconds of each of ``n`` steps, without synchronising a GPU between them."""
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
    """Return our training step, set up as in the trainer."""
    return step_on(model, to_batch(window), config)


def step_on(model: Llama, batch: Batch, config: TrainConfig) -> Step:
    """Return our training step on one micro-batch."""
    optimizer = make_adamw(model, config.optim, getattr(torch, config.dtype))
    if config.precision == "fp8":
        use_float8(model)
    compile_blocks(model, config.compile, config.recompute)
    optim = config.optim
    return lambda: train_step(model, optimizer, [batch], lr=optim.lr, grad_clip=optim.grad_clip)[0]


def fine_tuning(model: Llama, window: Tensor, config: TrainConfig) -> Step:
    """Return our step on the answers of the conversations of ``window``, packed."""
    tokens = window[:, :-1]
    length = conversation_length(window)
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    # The last token of a conversation predicts none; those before its second half, no answer's.
    is_asked = (place % length < length // 2 - 1) | (place % length == length - 1)
    targets = window[:, 1:].masked_fill(is_asked, IGNORE_INDEX)
    return step_on(model, packed_batch(torch.stack([tokens, targets, place // length], 1)), config)


def conversation_length(window: Tensor) -> int:
    """Return the tokens of each conversation that the rows of a window [B, T + 1] hold."""
    return (window.shape[1] - 1) // CONVERSATIONS


def transformers(model: Llama, window: Tensor, config: TrainConfig, part: str = "model") -> Step:
    """Return transformers' step; on a GPU the model, or each of its blocks, is compiled."""
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
    return plain_loop_step(peer, partial(peer_loss, peer), window, config)


def trl(model: Llama, window: Tensor, config: TrainConfig) -> Step:
    """Return TRL's step on the same answers, which it packs itself."""
    from .trl_peer import trl_step

    peer = transformers_peer(model, model.head_weight.device)
    if peer is None:
        sys.exit("transformers is not installed")
    length = conversation_length(window)
    rows = window[:, :-1].reshape(-1, length)
    return trl_step(peer, rows, length // 2, window.shape[1] - 1, config)


def plain_loop(model: Llama, window: Tensor, config: TrainConfig, compiled: bool = False) -> Step:
    """Return the step of a plain loop around our model's logits, all of which it keeps."""

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits, _ = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return plain_loop_step(model, torch.compile(loss) if compiled else loss, window, config)


def plain_loop_step(
    model: Any, loss: Callable[[Tensor, Tensor], Tensor], window: Tensor, config: TrainConfig
) -> Step:
    """Return the step of a plain loop with torch's fused AdamW; ``loss`` takes tokens, targets."""
    optim, dtype = config.optim, getattr(torch, config.dtype)
    optimizer = make_adamw(model, optim)
    return partial(
        plain_step, loss, optimizer, window, lr=optim.lr, grad_clip=optim.grad_clip, dtype=dtype
    )


SIDES: dict[str, Callable[[Llama, Tensor, TrainConfig], Step]] = {
    "ours": ours,
    BY_DEFAULT: ours,
    "transformers": transformers,
    "transformers, compiled": transformers,
    "transformers, blocks compiled": partial(transformers, part="blocks"),
    FINE_TUNING: fine_tuning,
    PRETRAINING: ours,
    TRL: trl,
    REWARD: ours_on_pairs,
    TRL_REWARD: trl_on_pairs,
    "plain loop": plain_loop,
    "plain loop, compiled": partial(plain_loop, compiled=True),
}


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    fields = json.loads(argv[0])
    job = Job(**(fields | {"model": ModelConfig(**fields["model"])}))
    replies, sys.stdout = (
        sys.stdout,
        sys.stderr,
    )  # libraries print to stderr, so that stdout holds results alone
    for result in run(job):
        print(json.dumps(result._asdict()), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
