"""Compare our training's losses with a plain loop's: ``python tools/learning.py --data FILE``.

For each seed, our step and a plain loop around transformers' Llama start from the same weights,
and take the same windows, schedule and AdamW. On a CPU both compute in float32, and differ by
rounding alone. On a GPU ours has bfloat16 weights whose lower halves the optimizer keeps, and the
plain loop float32 weights under autocast: the deviation over seeds says how much of their
difference is chance.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while modules are imported: see llama_common/interrupt.py. cli.run takes over.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The tools are not installed. Run as a script, their folder is on the path, where its parent
    # should be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llama_common import cli
from llama_common.errors import InputError, check, check_positive
from llama_common.files import write_text
from llama_torch.config import DataConfig, OptimConfig, TrainConfig
from llama_torch.data.text_files import require_found
from llama_torch.model.config import ModelConfig


@dataclass(frozen=True)
class LearningConfig:
    """Train with our step and with a plain transformers loop, and compare the losses."""

    command: ClassVar[str] = "python tools/learning.py"
    basic: ClassVar[str] = (
        "data seeds steps batch_size max_seq_len dim n_layers n_heads lr device out"
    )

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


def settings_for(config: LearningConfig, on_gpu: bool, seed: int) -> TrainConfig:
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
        dtype="bfloat16" if on_gpu else "float32",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(LearningConfig, argv)
    if config.out and not Path(config.out).parent.is_dir():
        raise InputError(f"--out {config.out}: there is no such folder; make it first")
    require_found(config.data.data)
    return _compare(config)


def _compare(config: LearningConfig) -> int:
    # These import torch, which takes seconds: a wrong flag is told before.
    from rich.console import Console

    from llama_torch.common.device import pick_device
    from llama_torch.data.corpus import describe, load_corpus
    from tools.benchmarks.learning_runs import run_seed, show

    device = pick_device(config.device)
    corpus = load_corpus(config.data, config.model.vocab_size, config.model.max_seq_len)
    console, runs = Console(stderr=True), []
    for seed in range(config.seeds):
        with console.status(f"seed {seed}"):  # shown on a terminal
            runs.append(run_seed(settings_for(config, device.type == "cuda", seed), corpus, device))
    if config.out:
        write_text(
            Path(config.out).resolve(), json.dumps([run._asdict() for run in runs], indent=1)
        )
    show(runs, f"{describe(corpus)}; {config.steps} steps on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
