"""Compare our training's losses with a plain loop's: ``python tools/learning.py --data FILE``.

For each seed, our step and a plain loop around transformers' Llama start from the same weights,
and take the same windows, schedule and AdamW. On a CPU both compute in float32, and differ by
rounding alone. On a GPU ours has bfloat16 weights whose lower halves the optimizer keeps, and the
plain loop float32 weights under autocast: the deviation over seeds says how much of their
difference is chance.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

if __name__ == "__main__":
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llama_torch.common import cli
from llama_torch.common.device import pick_device
from llama_torch.common.errors import InputError, check, check_positive
from llama_torch.common.files import write_text
from llama_torch.config import DataConfig, OptimConfig, TrainConfig
from llama_torch.data.corpus import Corpus, describe, load_corpus
from llama_torch.data.loader import train_batches, val_batches
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training.batch import to_batch
from llama_torch.training.compile import compile_blocks
from llama_torch.training.optimizer import learning_rate, make_adamw
from llama_torch.training.setup import build
from llama_torch.training.step import train_step
from llama_torch.training.validate import validation_loss
from tools.benchmarks.transformers_peer import autocast, peer_loss, plain_step, transformers_peer


@dataclass(frozen=True)
class LearningConfig:
    """Train with our step and with a plain transformers loop, and compare the losses."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    seeds: int = 3
    """Runs of each side: seeds 0, 1, ... of weights and data order."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 4
    """Windows in a step."""
    eval_batches: int = 64
    """Largest number of validation batches; 0 = all."""
    log_every: int = 10
    """Steps between the training losses in --out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    out: str = ""
    """JSON file to write, with the losses on the way; empty = none."""

    def __post_init__(self) -> None:
        check_positive(self, "seeds", "steps", "batch_size", "log_every")
        check(self.eval_batches >= 0, "eval_batches", self.eval_batches, "must not be negative")
        check(
            self.optim.z_loss == 0,
            "z_loss",
            self.optim.z_loss,
            "must be 0: the plain loop has none",
        )
        packed = self.data.pack_documents
        check(not packed, "pack_documents", packed, "must be left out: the plain loop packs none")


class Run(NamedTuple):
    """The losses of one seed: in training, every --log-every steps, and the final validation's."""

    seed: int
    steps: list[int]
    ours: list[float]
    peer: list[float]
    ours_final: float
    peer_final: float


def settings_for(config: LearningConfig, device: torch.device, seed: int) -> TrainConfig:
    """Return the trainer's settings for one run."""
    return TrainConfig(
        config.model,
        config.data,
        config.optim,
        steps=config.steps,
        batch_size=config.batch_size,
        eval_batches=config.eval_batches,
        log_every=config.log_every,
        seed=seed,
        dtype="bfloat16" if device.type == "cuda" else "float32",
    )


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(LearningConfig, argv)
    device = pick_device(config.device)
    if config.out and not Path(config.out).parent.is_dir():
        raise InputError(f"--out {config.out}: there is no such folder; make it first")
    corpus = load_corpus(config.data, config.model.vocab_size, config.model.max_seq_len)
    console, runs = Console(stderr=True), []
    for seed in range(config.seeds):
        with console.status(f"seed {seed}"):  # shown on a terminal
            runs.append(run_seed(settings_for(config, device, seed), corpus, device))
    if config.out:
        write_text(
            Path(config.out).resolve(), json.dumps([run._asdict() for run in runs], indent=1)
        )
    show(runs, f"{describe(corpus)}; {config.steps} steps on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
