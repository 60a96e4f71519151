"""The settings of fine-tuning: the trainer's, with other data and the paper's other numbers."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from llama_common.errors import InputError, check, check_positive, check_text, quoted

from .config import OptimConfig, RunConfig, SourceConfig

LLAMA2 = "llama2"


@dataclass(frozen=True)
class ConversationConfig(SourceConfig):
    """Where the conversations come from."""

    paths: ClassVar[tuple[str, ...]] = ("data", "val_data")

    data: tuple[str, ...] = ()
    """Files of conversations (.jsonl, also .gz or .zst; .parquet), folders or globs. A record holds
    messages, prompt and completion, or ShareGPT's conversations."""
    val_data: tuple[str, ...] = ()
    """Files that are held out; none = a share of --data."""
    val_fraction: float = 0.05
    """Share of the conversations of --data, spread evenly over it, held out for validation."""
    template: str = ""
    """File of a Jinja chat template, or llama2 for Llama 2's [INST] form; empty = the model's own.
    The run directory keeps it."""

    def absolute(self) -> Self:
        """Return the config with the template's path absolute."""
        is_path = self.template not in ("", LLAMA2)
        return replace(self, template=os.path.abspath(self.template)) if is_path else self


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Fine-tune a Llama on the answers of conversations, to chat with it.

    Learning rate, decay, step and epochs are those of Llama 2's section 3.1.
    """

    task: ClassVar[str] = "sft"
    command: ClassVar[str] = "python -m llama_torch.sft"
    longest_window: ClassVar[int] = 4096
    basic: ClassVar[str] = (
        "init_from data val_data template out resume epochs batch_size grad_accum max_seq_len lr "
        "device dry_run"
    )

    data: ConversationConfig = field(default_factory=ConversationConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5, warmup_steps=0))

    init_from: str = ""
    """Model directory to begin from. Its weights, shape, tokenizer and chat template are taken."""
    epochs: int = 2
    """Times that each conversation is read."""
    steps: int = 0
    """Optimizer steps; 0 = as many as --epochs take. With --resume the run's new length, and the
    end of its schedule."""
    grad_accum: int = 16
    """A step takes --batch-size times so many windows. Processes share them out, and each cuts its
    part into micro-batches of --batch-size."""
    log_every: int = 1
    """Steps between log lines."""
    eval_every: int = 20
    """Steps between validation losses."""
    sample_every: int = 20
    """Steps between sampled answers; 0 = none."""
    sample_prompt: str = ""
    """What the samples answer; empty = the first held-out conversation's prompt."""
    save_every: int = 20
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check(self.steps >= 0, "steps", self.steps, "must not be negative")
        check_positive(self, "epochs")
        super().__post_init__()
        if self.sample_prompt:
            check_text("sample_prompt", self.sample_prompt)

    def require_complete(self) -> None:
        """Raise InputError where a new run lacks its model, conversations or template."""
        if not self.init_from:
            raise InputError("--init-from is missing: name the model directory to fine-tune")
        if not self.data.data:
            raise InputError("--data is missing: name the files of conversations")
        template = self.data.template
        if template not in ("", LLAMA2) and not Path(template).exists():
            raise InputError(f"--template {template}: no such file; give a Jinja file, or {LLAMA2}")

    def next_commands(self) -> list[str]:
        """Return command lines to try on the model of a finished run."""
        return [f"python -m llama_torch.chat --ckpt {quoted(self.out)}"]
