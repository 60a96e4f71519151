"""The settings of reinforcement learning from human feedback: the trainer's, with a policy's."""

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from llama_common.errors import InputError, check, check_positive, check_text, quoted

from .config import OptimConfig, RunConfig
from .finetuning_config import LONGEST_WINDOW, SHAPE, ConversationConfig, require_fine_tuning
from .model.config import ModelConfig

NOT_HERE = "is not for reinforcement learning: leave it out"


@dataclass(frozen=True)
class PromptConfig(ConversationConfig):
    """Where the prompts come from, and what judges the answers to them."""

    hashed: ClassVar[str] = "a text of --data or --val-data, a chat template or a frozen model"
    frozen: ClassVar[tuple[str, ...]] = ("reward", "safety_reward", "reference")

    data: tuple[str, ...] = ()
    """Files, folders or globs of prompts: prompt, a text, or messages. They are .jsonl, also .gz or
    .zst, or .parquet; safety is the tag of a prompt that may elicit unsafe answers."""
    val_data: tuple[str, ...] = ()
    """Files of held-out prompts; none = a share of --data."""
    val_fraction: float = 0.05
    """Share of the prompts of --data, spread evenly over it, held out for validation."""
    reward: str = ""
    """Directory of the reward model."""
    safety_reward: str = ""
    """Directory of a safety reward model, whose score counts for prompts with the tag safety and
    wherever it is below 0.15 (R_c); empty = none."""
    reference: str = ""
    """Directory of the frozen model that the divergence is measured from; empty = --init-from."""

    def absolute(self) -> Self:
        """Return the config with absolute paths of the template and of the frozen models."""
        given = {name: getattr(self, name) for name in self.frozen}
        paths = {name: path and os.path.abspath(path) for name, path in given.items()}
        return replace(super().absolute(), **paths)


@dataclass(frozen=True)
class PpoOptimConfig(OptimConfig):
    """AdamW at a constant learning rate (paper section 3.2.3)."""

    lr: float = 1e-6
    """Peak learning rate."""
    final_lr_ratio: float = 1.0
    """The cosine ends at this share of the peak; 1 = the learning rate is constant."""
    warmup_steps: int = 0
    """Steps of linear warmup."""


@dataclass(frozen=True)
class PpoConfig(RunConfig):
    """Fine-tune a chat model by reinforcement learning, on the scores of reward models.

    PPO with the numbers of Llama 2's section 3.2.3, or with advantages of groups (GRPO).
    """

    task: ClassVar[str] = "ppo"
    command: ClassVar[str] = "python -m llama_torch.ppo"
    longest_window: ClassVar[int] = LONGEST_WINDOW
    fills_context: ClassVar[bool] = False
    hidden: ClassVar[str] = SHAPE
    basic: ClassVar[str] = (
        "init_from reward data out resume steps rollout_batch max_new_tokens advantages kl_weight "
        "lr dry_run"
    )

    model: ModelConfig = field(default_factory=lambda: ModelConfig(max_seq_len=LONGEST_WINDOW))
    data: PromptConfig = field(default_factory=PromptConfig)
    optim: PpoOptimConfig = field(default_factory=PpoOptimConfig)

    init_from: str = ""
    """Chat model to begin from. Its tokenizer and template are taken."""
    reference_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the reference and the reward models; auto = that of --dtype."""
    steps: int = 1600
    """Optimizer steps: the paper's 200 iterations of 8 minibatches. With --resume the run's new
    length."""
    rollout_batch: int = 512
    """Answers that are drawn at once, over all processes. Steps of a minibatch each learn them."""
    batch_size: int = 4
    """Answers in one forward pass of a process, at most."""
    grad_accum: int = 16
    """A minibatch, which a step takes, has --batch-size times so many answers. Processes share
    them out, and each cuts its part into micro-batches of --batch-size."""
    max_new_tokens: int = 128
    """Longest answer, in tokens. Prompts that leave no room for it are left out."""
    temperature: float = 1.0
    """Temperature of the samples, and of the log-probabilities that are learnt."""
    sample_rows: int = 64
    """Answers that a process draws at once."""
    advantages: Literal["value", "group"] = "value"
    """Of a value function, or of --group answers to each prompt (GRPO)."""
    group: int = 8
    """Answers to a prompt with --advantages group."""
    whiten_advantages: bool = True
    """Whiten the advantages of a value function over all answers that were drawn together."""
    mean: Literal["token", "sequence"] = "token"
    """Losses are means over tokens, or over answers of their tokens' means."""
    kl: Literal["reward", "loss"] = "reward"
    """Where the divergence counts: taken from each token's reward, or k2 added to the loss."""
    kl_weight: float = 0.01
    """Weight of the divergence, the paper's beta. That for its 34B and 70B models is 0.005."""
    policy_clip: float = 0.2
    """The ratio of new to old probabilities is clipped to 1 minus and plus this."""
    value_weight: float = 0.1
    """Weight of the value loss."""
    gamma: float = 1.0
    """Discount of a reward one token later."""
    lam: float = 0.95
    """GAE's lambda."""
    unended_penalty: float = 0.0
    """Taken from the score of an answer that --max-new-tokens cut."""
    log_every: int = 1
    """Steps between log lines."""
    eval_every: int = 40
    """Steps between validations: answers to held-out prompts are drawn and scored."""
    sample_every: int = 40
    """Steps between sampled answers; 0 = none."""
    sample_prompt: str = ""
    """What the samples answer; empty = the first held-out prompt."""
    save_every: int = 40
    """Steps between checkpoints. They are saved when all that was drawn is learnt."""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "rollout_batch", "max_new_tokens", "sample_rows", "group")
        check_positive(self, "temperature", "policy_clip", "batch_size", "grad_accum")
        check(self.sample_rows < 2**20, "sample_rows", self.sample_rows, "must be below 2^20")
        for name in ("temperature", "policy_clip"):
            check(math.isfinite(getattr(self, name)), name, getattr(self, name), "must be finite")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            check(0 <= value <= 1, name, value, "must lie between 0 and 1")
        for name in ("kl_weight", "value_weight", "unended_penalty"):
            value = getattr(self, name)
            check(0 <= value < math.inf, name, value, "must be zero or positive, and finite")
        unused = {"verify_every": self.verify_every, "z_loss": self.optim.z_loss}
        for name, value in unused.items():
            check(value == 0, name, value, NOT_HERE)
        for name, size in {"tp": self.parallel.tp, "fsdp": self.parallel.fsdp}.items():
            check(size == 1, name, size, NOT_HERE)
        check(self.precision == "dtype", "precision", self.precision, NOT_HERE)
        self._check_batches()
        super().__post_init__()
        if self.sample_prompt:
            check_text("sample_prompt", self.sample_prompt)

    def _check_batches(self) -> None:
        """Raise InputError where batches, minibatches and groups do not divide each other."""
        size, group = self.windows_per_step, self.answers_per_prompt
        # Whitened over one answer a score is 0, as an answer's advantage in a group of one is.
        several = "must be at least 2: of a single answer nothing is learnt"
        check(self.rollout_batch > 1, "rollout_batch", self.rollout_batch, several)
        if self.advantages == "group":
            check(group > 1, "group", group, several)
        each = f"must be a multiple of the minibatch, --batch-size times --grad-accum = {size}"
        check(self.rollout_batch % size == 0, "rollout_batch", self.rollout_batch, each)
        check(size % group == 0, "group", group, f"must divide the minibatch of {size} answers")
        whole = f"must be a multiple of {self.steps_at_once}, the minibatches of --rollout-batch"
        check(self.steps % self.steps_at_once == 0, "steps", self.steps, whole)

    @property
    def answers_per_prompt(self) -> int:
        """The number of answers that are drawn to a prompt."""
        return self.group if self.advantages == "group" else 1

    @property
    def steps_at_once(self) -> int:
        """Training steps that learn from what was drawn together."""
        return self.rollout_batch // self.windows_per_step

    @property
    def step_size(self) -> str:
        """What a training step takes, for people."""
        drawn = f", of {self.rollout_batch:,} drawn at once"
        return f"{self.windows_per_step:,} answers a step" + drawn * (self.steps_at_once > 1)

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: of frozen models only their hash."""
        found = super().identity()
        for name in self.data.frozen:
            del found["data"][name]
        return found

    def require_complete(self) -> None:
        """Raise InputError where a new run lacks its models, prompts or template."""
        require_fine_tuning(self.init_from, self.data, "prompts")
        if not self.data.reward:
            raise InputError("--reward is missing: name the directory of the reward model")

    def next_commands(self) -> list[str]:
        """Return command lines to try on the model of a finished run."""
        return [f"python -m llama_torch.chat --ckpt {quoted(self.out)}"]
