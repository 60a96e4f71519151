"""The settings of training: frozen dataclasses, validated where they are built."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from llama_common.errors import check, check_positive, check_text, quoted

from .model.config import ModelConfig

MOST_WORKERS = 1024  # more than any machine has cores


@dataclass(frozen=True)
class SourceConfig:
    """Where a run's windows come from, whatever they hold."""

    paths: ClassVar[tuple[str, ...]] = ("data",)  # the fields that name files, folders and globs
    hashed: ClassVar[str] = "the text of --data"  # what a resumed run must find unchanged

    data: tuple[str, ...] = ()
    """Files, folders or globs."""
    val_fraction: float = 0.1
    """Share held out for validation."""
    num_workers: int = 0
    """Processes that prepare batches; 0 = in the training process."""

    def __post_init__(self) -> None:
        check(
            0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "must lie between 0 and 1"
        )
        between = f"must lie between 0 and {MOST_WORKERS}"
        check(0 <= self.num_workers <= MOST_WORKERS, "num_workers", self.num_workers, between)

    def absolute(self) -> Self:
        """Return the config with absolute paths, but for those of the data: a run may move."""
        return self


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Where the text comes from."""

    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt .md .jsonl, also .gz or .zst; .parquet), or a folder of token
    shards (see python -m llama_torch.prepare); none = Python's own help topics."""
    weights: tuple[float, ...] = ()
    """Share of the training windows for each of --data; none = all of --data is one text."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    val_fraction: float = 0.1
    """Share of the tokens (with --weights, of each of --data), at the end, held out for
    validation."""
    pack_documents: bool = False
    """Let no document of a window see another: attention and positions begin anew in each."""
    cache_dir: str = ""
    """Where tokenised text is kept; empty = llama_torch in the user's cache directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights:
            each = f"must be a number for each of the {len(self.data)} --data"
            check(len(self.weights) == len(self.data), "weights", self.weights, each)
            positive = all(0 < weight < math.inf for weight in self.weights)
            check(positive, "weights", self.weights, "must be positive and finite")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (paper section 2.2: betas, eps, decay, clipping, final lr)."""

    lr: float = 3e-4
    """Peak learning rate."""
    final_lr_ratio: float = 0.1
    """The cosine ends at this share of the peak."""
    warmup_steps: int = 20
    """Steps of linear warmup."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-5
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices only."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision in which both moments are kept between steps. bfloat16 takes 4 bytes a parameter
    less, and needs --dtype bfloat16 without --fsdp and --tp."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    z_loss: float = 0.0
    """Weight of (log Z)^2 in the training loss (not in the validation loss); 0 = none."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "adam_eps", "grad_clip")
        for name in ("beta1", "beta2"):
            check(
                0 <= getattr(self, name) < 1,
                name,
                getattr(self, name),
                "must be at least 0 and below 1",
            )
        check(
            0 <= self.final_lr_ratio <= 1,
            "final_lr_ratio",
            self.final_lr_ratio,
            "must lie between 0 and 1",
        )
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must not be negative")
        for name in ("weight_decay", "z_loss"):
            value = getattr(self, name)
            check(0 <= value < math.inf, name, value, "must be zero or positive, and finite")


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share a run; those that these two leave over are replicas (DDP)."""

    fsdp: int = 1
    """Processes that share parameters, gradients and moments (FSDP2); 0 = all that --tp leaves."""
    tp: int = 1
    """Processes that share every product, and the vocabulary (tensor parallelism)."""

    def __post_init__(self) -> None:
        check(self.fsdp >= 0, "fsdp", self.fsdp, "must not be negative")
        check_positive(self, "tp")


@dataclass(frozen=True)
class RunConfig:
    """What all training runs are set by; each command has a subclass, with data of its own."""

    task: ClassVar[str]  # the command's name, in run.json
    command: ClassVar[str]
    longest_window: ClassVar[int] = 2**31  # largest default of --max-seq-len with --init-from
    fills_context: ClassVar[bool] = True  # whether rows of a micro-batch have --max-seq-len tokens
    hidden: ClassVar[str] = ""  # flags that no help shows: taken from the model, or refused

    model: ModelConfig = field(default_factory=ModelConfig)
    data: SourceConfig = field(default_factory=SourceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    config: str = ""
    """TOML file of settings: these flags' names as keys, in any section; flags win over it."""
    out: str = ""
    """Run directory; empty = the next free runs/N (with --resume: the last worked on)."""
    init_from: str = ""
    """Model directory to begin from. Its weights, shape and tokenizer are taken, the optimizer is
    fresh, and --max-seq-len may be less than its own."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with its own settings."""

    steps: int = 240
    """Optimizer steps; with --resume the run's new length, and the end of its schedule."""
    batch_size: int = 4
    """Windows (rows of --max-seq-len tokens) in one forward pass of a process, at most."""
    grad_accum: int = 1
    """A step takes --batch-size times so many windows. Processes share them out, and each cuts its
    part into micro-batches of --batch-size."""
    seed: int = 0
    """Seed of initialisation, data order and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and activations; auto = bfloat16 where the hardware computes it. The
    optimizer keeps float32 weights either way, and checkpoints hold those."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Precision of the blocks' matrix products in training: that of --dtype, or fp8 with one scale
    for each tensor (E4M3, gradients E5M2), which needs a GPU to be fast and wide layers to pay."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """torch.set_float32_matmul_precision. On a CPU with AMX too, medium multiplies float32 in
    bfloat16, all but products of a few rows."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile for the blocks: auto = on a GPU."""
    recompute: Literal["auto", "none", "cheap", "all"] = "auto"
    """Activations to compute again in the backward pass instead of keeping them: cheap = all but
    matrix products and attention; all = everything inside a block; auto = cheap when compiled, but
    none in fp8."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 40
    """Steps between validation losses."""
    eval_batches: int = 8
    """Largest number of validation batches; 0 = all."""
    sample_every: int = 80
    """Steps between samples of text; 0 = none."""
    sample_prompt: str = "The"
    """What the samples continue."""
    save_every: int = 80
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints that are kept: the newest so many."""
    keep_best: bool = True
    """Keep the model of the lowest validation loss in the run directory's best/."""
    skip_bad_steps: bool = False
    """Leave out the update of a step whose loss or gradient is not finite or explodes, instead of
    stopping there. A GPU is waited for at every step."""
    verify_every: int = 0
    """Steps between checks of logits, loss and gradients against the NumPy oracle, on a few rows;
    what is out of bounds stops the run (exit code 1); 0 = never."""
    profile: bool = False
    """Write a trace of a few steps to the run directory; Perfetto (ui.perfetto.dev) opens it."""
    dry_run: bool = False
    """Take a few steps, print parameters, memory and time of the whole run, and leave nothing."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "grad_accum", "log_every", "eval_every")
        check_positive(self, "save_every", "keep_last")
        for name in ("eval_batches", "sample_every", "verify_every"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must lie between 0 and 2^32 - 1")
        windows = self.steps * self.windows_per_step
        numbered = "times --batch-size and --grad-accum must be below 2^63"
        check(windows < 2**63, "steps", windows, numbered)
        # transformers refuses to load any other shape, and a run must load everywhere.
        model, of_heads = self.model, f"must be a multiple of --n-heads {self.model.n_heads}"
        check(model.dim % model.n_heads == 0, "dim", model.dim, of_heads)
        if self.precision == "fp8":
            self._check_fp8()

    @property
    def windows_per_step(self) -> int:
        """The number of windows in a training step, over all processes."""
        return self.batch_size * self.grad_accum

    @property
    def steps_at_once(self) -> int:
        """Training steps between the places at which a run may be saved and stopped."""
        return 1

    def require_complete(self) -> None:
        """Raise InputError where a new run lacks a setting without which it cannot begin."""

    def next_commands(self) -> list[str]:
        """Return command lines to try on the model of a finished run."""
        return []

    def with_steps(self, steps: int) -> Self:
        """Return the config with its length known."""
        return dataclasses.replace(self, steps=steps)

    @property
    def step_size(self) -> str:
        """What a training step takes, for people."""
        return f"{self.windows_per_step * self.model.max_seq_len:,} tokens a step"

    def _check_fp8(self) -> None:
        """Raise InputError for shapes and layouts that have no products in fp8."""
        check(self.parallel.tp == 1, "tp", self.parallel.tp, "must be 1 with --precision fp8")
        model = self.model
        widths = {"dim": model.dim, "hidden_dim": model.hidden_dim}
        widths["max_seq_len"] = model.max_seq_len  # times windows: the rows of a product
        widths["n_kv_heads"] = model.n_kv_heads * model.head_dim
        for name, width in widths.items():
            what = "times head_dim " if name == "n_kv_heads" else ""
            check(width % 16 == 0, name, width, f"{what}must be a multiple of 16 in fp8")

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the losses, which a resumed run must share."""
        flat = dataclasses.asdict(self)
        reporting = ("log_every", "eval_every", "eval_batches", "sample_every", "sample_prompt")
        running = ("config", "out", "resume", "device", "save_every", "profile", "dry_run")
        # Whoever stopped at a bad step may want to continue over it.
        keeping = ("keep_last", "keep_best", "skip_bad_steps", "verify_every")
        for name in (*running, *keeping, "compile", "recompute", "parallel", *reporting):
            del flat[name]
        for name in ("cache_dir", "num_workers", "text_field", *self.data.paths):
            flat["data"].pop(name, None)  # the tokens themselves are compared by their hash
        identity: dict[str, Any] = json.loads(json.dumps(flat))
        return identity


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train a Llama on text and leave a Hugging Face model directory."""

    task: ClassVar[str] = "train"
    command: ClassVar[str] = "python -m llama_torch.train"
    basic: ClassVar[str] = (
        "data out init_from config resume steps batch_size max_seq_len dim n_layers n_heads lr "
        "device dry_run"
    )

    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_positive(self, "steps")
        super().__post_init__()
        check_text("sample_prompt", self.sample_prompt)

    def next_commands(self) -> list[str]:
        """Return command lines to try on the model of a finished run."""
        return [
            f"python tools/compare.py {quoted(self.out + '/model.safetensors')}",
            f"python -m llama_torch.generate --ckpt {quoted(self.out)} "
            f"--prompt {quoted(self.sample_prompt)}",
        ]
