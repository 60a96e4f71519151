"""Measure training beside other loops, the work "train" of bench.py.

Each side runs in a process of its own, training_side.py, since a process keeps the memory it has
used and the code it has compiled.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from llama_torch.common.device import total_memory
from llama_torch.config import TrainConfig
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.model.reward import RewardModel
from llama_torch.training.memory import require_batch_memory
from llama_torch.training.throughput import flops_per_token

from .reward_sides import REWARD, TRL_REWARD, bench_pairs, reward_trunk
from .timing import Setup, median_ratio
from .training_side import BY_DEFAULT, FINE_TUNING, LEARNT, PRETRAINING, TRL, Job, Result

ROOT = Path(__file__).resolve().parent.parent.parent
FACTOR_CUDA = 3  # times as many steps are timed on a GPU, where steps are short
ON_CPU = ("ours", "transformers", "plain loop", "plain loop, compiled")
# Compiled as a whole, before torch 2.14, transformers' model builds a mask: no flash attention.
ON_CUDA = ("ours", "transformers, compiled", "transformers, blocks compiled")


class TrainRow(NamedTuple):
    """One row of the training table; speeds in tokens/s, memory in bytes. None: the side failed."""

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


TakeSteps = Callable[[int], Result | None]  # number of steps -> their result; None: it failed


def measure(
    setup: Setup, model: ModelConfig, batch_size: int, work: str = "train"
) -> list[TrainRow]:
    """Time every side's training step; return a row for each peer of ours.

    On a CPU, whose speed drifts, all processes run at once and take a step in turn. On a GPU, whose
    memory one needs for itself, they run one after another, in bfloat16 whatever ``setup`` says.
    The error of a side that fails is printed on stderr, in one line. Raises InputError for a batch
    that none can hold.
    """
    on_cuda = setup.device.type == "cuda"
    names = sides(setup, work)
    dtype = "bfloat16" if on_cuda else setup.dtype
    sizes = TrainConfig(model=model, batch_size=batch_size, dtype=dtype)  # type: ignore[arg-type]
    require_batch_memory(sizes, total_memory(setup.device))
    turns = [0, setup.repeats * FACTOR_CUDA] if on_cuda else [0, *[1] * setup.repeats]
    if on_cuda:
        torch.cuda.empty_cache()  # frees what earlier works allocated
    results: dict[str, list[Result]] = {}
    for together in [[name] for name in names] if on_cuda else [names]:
        with ExitStack() as stack:
            given = model, batch_size, dtype, setup.device.type
            jobs = [Job(name, *given, setup.precision, setup.moments) for name in together]
            asks = {job.side: stack.enter_context(side_process(job)) for job in jobs}
            results |= take_turns(asks, turns)
        losses = {name: found[0].loss_first for name, found in results.items()}
        # Pretraining learns all tokens of the same rows, and so has another loss.
        same_losses({name: x for name, x in losses.items() if name != PRETRAINING}, dtype, names[0])
    return training_rows(setup, model, batch_size, dtype, results, work)


def sides(setup: Setup, work: str = "train") -> list[str]:
    """Return the names of the sides, ours first; ours by default is one where it has options."""
    first, *others = ON_CUDA if setup.device.type == "cuda" else ON_CPU
    is_special = setup.precision == "fp8" or setup.moments == "bfloat16"
    names = [first, *([BY_DEFAULT] if is_special else []), *others]
    if work == "sft":
        names = [FINE_TUNING, PRETRAINING, TRL]
    if work == "reward":
        names = [REWARD, TRL_REWARD]
    return [name for name in names if name.startswith(first) or not setup.ours_alone]


def take_turns(asks: Mapping[str, TakeSteps], turns: Sequence[int]) -> dict[str, list[Result]]:
    """Return each side's results of ``turns``, numbers of steps, without the sides that failed."""
    results: dict[str, list[Result]] = {name: [] for name in asks}
    for steps in turns:
        for name in list(results):
            result = asks[name](steps)
            if result is None:
                del results[name]
            else:
                results[name].append(result)
    return results


@contextmanager
def side_process(job: Job) -> Iterator[TakeSteps]:
    """Start a side's process; yield a function that times some steps in it."""
    text = json.dumps(job._asdict() | {"model": asdict(job.model)})
    command = [sys.executable, "-m", "tools.benchmarks.training_side", text]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, cwd=ROOT, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors
        ) as process,
    ):
        requests, replies = process.stdin, process.stdout
        assert requests
        assert replies

        def take_steps(steps: int) -> Result | None:
            with suppress(BrokenPipeError):  # it may have ended already
                requests.write(b"%d\n" % steps)
            if reply := replies.readline():
                return Result(**json.loads(reply))
            status = process.wait()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            errors_named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
            why = (errors_named or lines or [f"ended with {status}"])[-1]
            print(f"train: {job.side}: {why}", file=sys.stderr)
            return None

        yield take_steps


def same_losses(losses: dict[str, float], dtype: str, first: str = "ours") -> None:
    """Raise RuntimeError unless the first losses of all sides are ours, that of ``first``."""
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    ours = losses.get(first)
    for name, loss in losses.items():
        if ours is not None and not abs(loss - ours) <= tolerance * abs(ours):
            raise RuntimeError(
                f"train: the first loss of {name} is {loss:.6f} and ours {ours:.6f}; "
                "their speed says nothing"
            )


def training_rows(
    setup: Setup,
    model: ModelConfig,
    batch_size: int,
    dtype: str,
    results: Mapping[str, list[Result]],
    work: str = "train",
) -> list[TrainRow]:
    """Return a row for each peer, from every side's results."""
    tokens = batch_size * model.max_seq_len
    counted, kind = model, Llama
    if work == "reward":  # padding is no token of a pair
        tokens = int(bench_pairs(model, batch_size).lengths.sum())
        counted, kind = reward_trunk(model, batch_size), RewardModel
    speeds = {
        name: [tokens / statistics.median(turn.seconds) for turn in found if turn.seconds]
        for name, found in results.items()
    }
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    memory = {name: found[-1].peak_bytes for name, found in results.items()}
    first, *others = sides(setup, work)
    ours, mfu = medians.get(first), None
    if ours is not None:
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in kind(counted).parameters())
        peaks = [turn.peak_flops for turn in results[first] if turn.seconds]
        learnt = LEARNT if first == FINE_TUNING else 1.0
        mfu = flops_per_token(counted, n_parameters, learnt) * median_ratio(speeds[first], peaks)
    return [
        TrainRow(
            *(work, setup.shape, dtype, ours, mfu, memory.get(first)),
            *(peer, medians.get(peer), memory.get(peer)),
            median_ratio(speeds[first], speeds[peer]) if ours and peer in speeds else None,
        )
        for peer in others or ["none"]
    ]
