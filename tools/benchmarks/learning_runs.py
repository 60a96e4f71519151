"""Train our step and a plain transformers loop side by side, and show their losses."""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama_common.errors import InputError
from llama_torch.config import TrainConfig
from llama_torch.data.corpus import Corpus
from llama_torch.data.loader import train_batches, val_batches
from llama_torch.model.llama import Llama
from llama_torch.training.batch import to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.optimizer import learning_rate, make_adamw
from llama_torch.training.setup import build
from llama_torch.training.step import train_step
from llama_torch.training.validate import validation_loss

from .transformers_peer import autocast, peer_loss, plain_step, transformers_peer


class Run(NamedTuple):
    """The losses of one seed: in training, every --log-every steps, and the final validation's."""

    seed: int
    steps: list[int]
    ours: list[float]
    peer: list[float]
    ours_final: float
    peer_final: float


def run_seed(config: TrainConfig, corpus: Corpus, device: torch.device) -> Run:
    """Train both sides on the same windows, a step of each in turn."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    peer = make_peer(config, device)
    peer_optimizer = make_adamw(peer, config.optim)
    torch.set_float32_matmul_precision(config.matmul_precision)
    model, optimizer = build(config.model, config.optim, config.seed, dtype, device)
    compile_blocks(model, config.compile, config.recompute)
    clip = config.optim.grad_clip
    logged: dict[int, tuple[Tensor, Tensor]] = {}  # kept on the device, without synchronising it
    for step, window in enumerate(windows(config, corpus)):
        lr = learning_rate(step, config.steps, config.optim)
        ours, _ = train_step(model, optimizer, [to_batch(window)], lr=lr, grad_clip=clip)
        theirs = plain_step(
            partial(peer_loss, peer), peer_optimizer, window, lr=lr, grad_clip=clip, dtype=dtype
        )
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            logged[step + 1] = ours, theirs
    held_out = val_batches(corpus, config.model.max_seq_len, config.batch_size, config.eval_batches)
    return Run(
        config.seed,
        list(logged),
        [ours.item() for ours, _ in logged.values()],
        [theirs.item() for _, theirs in logged.values()],
        validation_loss(model, held_out),
        evaluate_peer(peer, held_out, device, dtype),
    )


def windows(config: TrainConfig, corpus: Corpus) -> Iterator[Tensor]:
    """Return the windows [B, T + 1] of the trainer's steps."""
    return train_batches(
        corpus,
        config.model.max_seq_len,
        seed=config.seed,
        rows=config.batch_size,
        first=0,
        last=config.steps,
        workers=config.data.num_workers,
    )


def make_peer(config: TrainConfig, device: torch.device) -> Any:
    """Return transformers' model with our initial weights.

    Raises InputError where transformers is not installed.
    """
    model = Llama(config.model)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    peer = transformers_peer(model.to(device), device)
    if peer is None:
        raise InputError("the plain loop needs transformers; pip install 'llama-parity[test]'")
    return peer.train()


@torch.no_grad()
def evaluate_peer(
    peer: Any, windows: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> float:
    """Return the peer's mean loss over ``windows`` [B, T + 1], in nats per token."""
    total, n_valid = torch.zeros((), dtype=torch.float64, device=device), 0
    for window in windows:
        tokens, targets, *_ = to_batch(window).to(device)
        with autocast(device, torch.float32, dtype):
            logits = peer(tokens, use_cache=False).logits
        logits = logits.float().flatten(0, 1)
        total += F.cross_entropy(logits, targets.flatten(), reduction="sum")
        n_valid += targets.numel()
    return total.item() / n_valid


def show(runs: Sequence[Run], title: str) -> None:
    """Print a table of the final validation losses, their means and standard deviations."""
    table = Table(title=title, caption="validation loss after the last step, nats per token")
    for heading in ("seed", "ours", "transformers", "ours - transformers"):
        table.add_column(heading, justify="right")
    losses = [(run.ours_final, run.peer_final, run.ours_final - run.peer_final) for run in runs]
    for run, values in zip(runs, losses, strict=True):
        table.add_row(str(run.seed), *written(values))
    table.add_section()
    columns = list(zip(*losses, strict=True))
    table.add_row("mean", *written([statistics.mean(column) for column in columns]))
    if len(runs) > 1:  # one has no deviation
        spreads = [f"{statistics.stdev(column):.4f}" for column in columns]
        table.add_row("standard deviation", *spreads)
    Console(highlight=False).print(table)


def written(values: Sequence[float]) -> list[str]:
    """Return our loss, the peer's and their difference as text."""
    ours, peer, difference = values
    return [f"{ours:.4f}", f"{peer:.4f}", f"{difference:+.4f}"]
