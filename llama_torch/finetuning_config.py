"""The settings of fine-tuning: the trainer's, with other data and the paper's other numbers."""

import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from llama_common.errors import InputError, check, check_positive, check_text, quoted

from .config import OptimConfig, RunConfig, SourceConfig
from .model.config import ModelConfig

LLAMA2 = "llama2"
LONGEST_WINDOW = 4096  # of training, unless --max-seq-len asks for more: the paper's
NOT_FOR_REWARDS = "is not for reward models: leave it out"
# The flags that --init-from takes from the model.
SHAPE = " ".join(one.name for one in fields(ModelConfig) if one.name != "max_seq_len")


@dataclass(frozen=True)
class ConversationConfig(SourceConfig):
    """Where the conversations come from."""

    paths: ClassVar[tuple[str, ...]] = ("data", "val_data")
    hashed: ClassVar[str] = "a text of --data or --val-data, or the run's own chat template,"

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


def require_fine_tuning(init_from: str, data: ConversationConfig, kind: str) -> None:
    """Raise InputError where a new run lacks its model, its data (of that kind) or template."""
    if not init_from:
        raise InputError("--init-from is missing: name the model directory to fine-tune")
    if not data.data:
        raise InputError(f"--data is missing: name the files of {kind}")
    require_template(data.template)


def require_template(template: str) -> None:
    """Raise InputError for a --template that is no file, llama2 or empty."""
    if template not in ("", LLAMA2) and not Path(template).exists():
        raise InputError(f"--template {template}: no such file; give a Jinja file, or {LLAMA2}")


@dataclass(frozen=True)
class PreferenceConfig(ConversationConfig):
    """Where the pairs of answers come from."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of pairs: prompt, chosen and rejected. They
    are .jsonl, also .gz or .zst, or .parquet; without prompt, chosen and rejected are whole
    conversations, or Anthropic's dialogues. strength, safety, chosen_safe and rejected_safe are
    optional."""
    val_data: tuple[str, ...] = ()
    """Files of held-out pairs; none = a share of --data."""
    val_fraction: float = 0.05
    """Share of the pairs of --data, spread evenly over it, held out for validation."""


@dataclass(frozen=True)
class RewardOptimConfig(OptimConfig):
    """AdamW and its schedule (paper section 3.2.2: learning rate, warmup, final lr)."""

    lr: float = 1e-5
    """Peak learning rate. The paper's for its 70B model is 5e-6."""
    warmup_steps: int = 0
    """Steps of linear warmup; 0 = 3% of the run's, and at least 5."""


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Fine-tune a Llama on the answers of conversations, to chat with it.

    Learning rate, decay, step and epochs are those of Llama 2's section 3.1.
    """

    task: ClassVar[str] = "sft"
    command: ClassVar[str] = "python -m llama_torch.sft"
    longest_window: ClassVar[int] = LONGEST_WINDOW
    hidden: ClassVar[str] = SHAPE
    basic: ClassVar[str] = (
        "init_from data val_data template out resume epochs batch_size grad_accum max_seq_len lr "
        "device dry_run"
    )

    model: ModelConfig = field(default_factory=lambda: ModelConfig(max_seq_len=LONGEST_WINDOW))
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
        check(self.epochs < 2**31, "epochs", self.epochs, "must be below 2^31")
        super().__post_init__()
        if self.sample_prompt:
            check_text("sample_prompt", self.sample_prompt)

    def require_complete(self) -> None:
        """Raise InputError where a new run lacks its model, conversations or template."""
        require_fine_tuning(self.init_from, self.data, "conversations")

    def next_commands(self) -> list[str]:
        """Return command lines to try on the model of a finished run."""
        return [f"python -m llama_torch.chat --ckpt {quoted(self.out)}"]


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """Train a reward model on pairs of answers; leave a directory that transformers loads.

    Loss, learning rate, step and epochs are those of Llama 2's section 3.2.2.
    """

    task: ClassVar[str] = "reward"
    command: ClassVar[str] = "python -m llama_torch.reward"
    longest_window: ClassVar[int] = LONGEST_WINDOW
    fills_context: ClassVar[bool] = False
    hidden: ClassVar[str] = f"{SHAPE} sample_every sample_prompt verify_every z_loss tp precision"
    basic: ClassVar[str] = (
        "init_from data val_data template margin safety_loss out resume batch_size grad_accum lr "
        "device"
    )

    model: ModelConfig = field(default_factory=lambda: ModelConfig(max_seq_len=LONGEST_WINDOW))
    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    optim: RewardOptimConfig = field(default_factory=RewardOptimConfig)

    init_from: str = ""
    """Model directory to begin from. Its trunk, tokenizer and chat template are taken."""
    margin: Literal["small", "large", "none"] = "small"
    """Margin by strength: small = 1, 2/3, 1/3, 0; large = 3, 2, 1, 0. The chosen answer's score
    must be so much higher; without a strength it is 0."""
    safety_loss: float = 0.0
    """Weight of the auxiliary loss on whether answers are safe; 0 = none. They are where
    chosen_safe and rejected_safe say so."""
    epochs: int = 1
    """Times that each pair is read."""
    steps: int = 0
    """Optimizer steps; 0 = as many as --epochs take. With --resume the run's new length, and the
    end of its schedule."""
    batch_size: int = 4
    """Pairs in one forward pass of a process, at most."""
    grad_accum: int = 128
    """A step takes --batch-size times so many pairs. Processes share them out, and each cuts its
    part into micro-batches of --batch-size."""
    log_every: int = 1
    """Steps between log lines."""
    eval_every: int = 20
    """Steps between validation losses."""
    eval_batches: int = 0
    """Largest number of validation batches; 0 = all."""
    sample_every: int = 0
    """0: a reward model writes no text."""
    sample_prompt: str = ""
    """Not used."""
    save_every: int = 20
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check(self.steps >= 0, "steps", self.steps, "must not be negative")
        check_positive(self, "epochs")
        check(self.epochs < 2**31, "epochs", self.epochs, "must be below 2^31")
        weight = self.safety_loss
        check(0 <= weight < math.inf, "safety_loss", weight, "must be zero or positive, and finite")
        unused = {name: getattr(self, name) for name in ("sample_every", "verify_every")}
        for name, value in {**unused, "z_loss": self.optim.z_loss}.items():
            check(value == 0, name, value, NOT_FOR_REWARDS)
        check(self.parallel.tp == 1, "tp", self.parallel.tp, NOT_FOR_REWARDS)
        check(self.precision == "dtype", "precision", self.precision, NOT_FOR_REWARDS)
        super().__post_init__()

    def require_complete(self) -> None:
        """Raise InputError where a new run lacks its model, pairs or template."""
        require_fine_tuning(self.init_from, self.data, "pairs")

    def with_steps(self, steps: int) -> Self:
        """Return the config with its length known, and so the warmup."""
        given = self.optim.warmup_steps or max(5, math.ceil(0.03 * steps))
        return replace(self, steps=steps, optim=replace(self.optim, warmup_steps=given))

    @property
    def step_size(self) -> str:
        """What a training step takes, for people."""
        return f"{self.windows_per_step:,} pairs a step"
