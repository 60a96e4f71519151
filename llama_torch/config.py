"""Every setting of the package: frozen dataclasses, validated where they are built.

The training settings are the command line's flags and the TOML file's keys as well.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class InputError(ValueError):
    """Something a user supplied is wrong; the message names it and the remedy."""


class Breach(Exception):  # noqa: N818
    """What must hold does not; the message says what, and by how much."""


def check(valid: bool, flag: str, value: object, requirement: str) -> None:
    """Raise InputError naming the flag unless ``valid``."""
    if not valid:
        raise InputError(f"--{flag.replace('_', '-')} {requirement}, got {value!r}")


def check_positive(config: object, *names: str) -> None:
    """Raise InputError naming the first of these fields that is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        # No float holds an integer much larger than this.
        check(0 < value < 1e300, name, value, "must be positive")


def check_types(config: object) -> None:
    """Raise InputError naming the first field whose value is not of its default's type."""
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, item.name), type(item.default)
        accepted = (int, float) if kind is float else (kind,)
        check(type(value) in accepted, item.name, value, f"must be of type {kind.__name__}")


def check_text(flag: str, value: str) -> None:
    """Raise InputError naming the flag for a text that is empty or not Unicode."""
    check(bool(value), flag, value, "must not be empty")
    # Bytes of the command line that are not text arrive as lone surrogates.
    check(not has_surrogates(value), flag, value, "must be valid text")


def has_surrogates(text: str) -> bool:
    """Return whether a text holds what is no character: bytes of another encoding."""
    return any("\ud800" <= character <= "\udfff" for character in text)


# ModelConfig field -> Hugging Face key. The rotary ones have two places; see _rope_fields.
HF_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

# ModelConfig field -> key below rope_scaling, and which of them each kind of scaling has.
ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
}
ROPE_USES = {"default": (), "linear": ("rope_factor",), "llama3": tuple(ROPE_KEYS)}

# Keys that would change the result, with the value that does not.
NEUTRAL = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "rope_interleaved": False,
}

# Keys that say how a model is used, stored or reported, and never what it computes.
INERT = (
    "architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward do_sample "
    "dtype eos_token_id finetuning_task id2label initializer_range is_llama_config label2id "
    "max_length max_sequence_length name_or_path num_return_sequences output_attentions "
    "output_hidden_states pad_token_id problem_type return_dict temperature tokenizer_class "
    "top_k top_p torch_dtype transformers.js_config transformers_version unk_token_id "
    "unsloth_fixed use_cache use_return_dict"
)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture (paper section 2.2). The defaults train in minutes on two CPU cores."""

    dim: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 4
    """Key/value heads; fewer than --n-heads is grouped-query attention."""
    head_dim: int = 0
    """Width of one head; 0 = dim / n_heads."""
    hidden_dim: int = 0
    """Width of the feed-forward network; 0 = the paper's int(8 dim / 3) rounded up to 32."""
    vocab_size: int = 50257
    """Token ids; the GPT-2 encoding has 50257."""
    max_seq_len: int = 256
    """Context length in tokens: the window trained on and the longest generated."""
    norm_eps: float = 1e-5
    """RMSNorm's epsilon, inside the square root."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """Scaling of the rotary frequencies; the next flags say how."""
    rope_factor: float = 1.0
    """Low frequencies (linear: all of them) are divided by this."""
    rope_low_freq_factor: float = 1.0
    """llama3: waves longer than the original context over this are wholly scaled."""
    rope_high_freq_factor: float = 4.0
    """llama3: waves shorter than the original context over this are not scaled."""
    rope_original_max_seq_len: int = 8192
    """llama3: the context before scaling."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")
        check_positive(self, "max_seq_len", "norm_eps", "rope_theta", *ROPE_KEYS)
        one_of = f"must be one of {', '.join(ROPE_USES)}"
        check(self.rope_type in ROPE_USES, "rope_type", self.rope_type, one_of)
        check(
            self.rope_low_freq_factor < self.rope_high_freq_factor,
            "rope_low_freq_factor",
            self.rope_low_freq_factor,
            f"must be below --rope-high-freq-factor {self.rope_high_freq_factor}",
        )
        if self.head_dim == 0:
            check(
                self.dim % self.n_heads == 0,
                "dim",
                self.dim,
                f"must be a multiple of --n-heads {self.n_heads} unless --head-dim is given",
            )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.hidden_dim == 0:
            object.__setattr__(self, "hidden_dim", math.ceil(int(8 * self.dim / 3) / 32) * 32)
        check_positive(self, "head_dim", "hidden_dim")
        check(
            self.n_heads % self.n_kv_heads == 0,
            "n_heads",
            self.n_heads,
            f"must be a multiple of --n-kv-heads {self.n_kv_heads}",
        )
        check(
            self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even for rotary embeddings"
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Build from ``config.json`` keys; refuse by name whatever would change the result."""
        known = {*HF_KEYS.values(), *INERT.split(), "rope_theta", "rope_scaling", "rope_parameters"}
        problems = [
            f"{key}={value!r} (supported: {NEUTRAL[key]!r})"
            for key, value in hf.items()
            if key in NEUTRAL and value is not None and value != NEUTRAL[key]
        ]
        problems += [
            f"{key}={value!r} (unknown: remove it if it changes nothing)"
            for key, value in hf.items()
            if key not in NEUTRAL
            and key not in known
            and not key.startswith("_")
            and value not in (None, False, {}, [])
        ]
        rope, rope_problems = _rope_fields(hf)
        if problems := problems + rope_problems:
            raise InputError(f"{source}: not supported: {'; '.join(problems)}")
        values: dict[str, Any] = {name: hf.get(key) for name, key in HF_KEYS.items()}
        for name, key in HF_KEYS.items():
            got = values[name]
            if type(getattr(cls, name)) is not int or got is None:
                continue
            # Zero means "derive it" on the command line, and nothing in a file.
            if type(got) is not int or not 0 < got < 2**31:
                raise InputError(f"{source}: {key} must be a positive integer, got {got!r}")
        derived = {"n_kv_heads": values["n_heads"], "head_dim": 0, "tie_embeddings": False}
        for name, value in derived.items():
            values[name] = value if values[name] is None else values[name]
        missing = [HF_KEYS[name] for name, value in values.items() if value is None]
        if missing:
            raise InputError(f"{source}: missing {', '.join(missing)}; add the model's value")
        try:
            return cls(**values, **rope)
        except InputError as error:
            message = str(error)
            for name, key in (HF_KEYS | ROPE_KEYS | {"rope_theta": "rope_theta"}).items():
                # A flag's name means nothing in a file.
                message = message.replace(f"--{name.replace('_', '-')} ", f"{key} ")
            raise InputError(f"{source}: {message}") from None

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` form; ``from_hf`` of it is this config again.

        The rotary base and scaling are written in both of their places: older readers know
        only the first.
        """
        scaling = {ROPE_KEYS[name]: getattr(self, name) for name in ROPE_USES[self.rope_type]}
        scaling = {"rope_type": self.rope_type, **scaling}
        return {
            "architectures": ["LlamaForCausalLM"],
            **NEUTRAL,
            **{key: getattr(self, name) for name, key in HF_KEYS.items()},
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling if len(scaling) > 1 else None,
            "rope_parameters": {**scaling, "rope_theta": self.rope_theta},
            "dtype": "float32",
        }


def _rope_fields(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read the rotary base and scaling from both of their places, and what is wrong there.

    A base that is nowhere is 10000, the paper's.
    """
    problems, thetas, scalings = [], [hf.get("rope_theta")], []
    for place in ("rope_scaling", "rope_parameters"):
        if hf.get(place) is None:
            continue
        rope = dict(hf[place]) if isinstance(hf[place], dict) else {"not an object": hf[place]}
        thetas.append(rope.pop("rope_theta", None))
        kinds = [kind for kind in (rope.pop("rope_type", None), rope.pop("type", None)) if kind]
        kind = kinds[0] if kinds else "default"
        known = isinstance(kind, str) and kind in ROPE_USES
        keys = {ROPE_KEYS[name]: name for name in ROPE_USES[kind]} if known else {}
        if not known or kinds[1:] not in ([], [kind]) or set(rope) - set(keys):
            problems.append(f"{place}={hf[place]!r} (supported: default, linear, llama3 scaling)")
        elif missing := [key for key in keys if rope.get(key) is None]:
            problems.append(f"{place}={hf[place]!r} (missing {', '.join(missing)})")
        else:
            scalings.append({"rope_type": kind, **{keys[key]: rope[key] for key in keys}})
    found = [theta for theta in thetas if theta is not None]
    if any(theta != found[0] for theta in found):
        problems.append(f"contradictory rotary bases rope_theta={found}; keep one")
    if any(scaling != scalings[0] for scaling in scalings):
        problems.append("rope_scaling contradicts rope_parameters; keep one of them")
    fields = {"rope_theta": found[0] if found else 10000.0}
    return fields | (scalings[0] if scalings else {}), problems


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt .md .jsonl .parquet), or a folder of token shards (see python
    -m llama_torch.data); none = Python's own help topics."""
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
    num_workers: int = 0
    """Processes that prepare batches; 0 = in the training process."""

    def __post_init__(self) -> None:
        check(
            0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "must lie between 0 and 1"
        )
        check(self.num_workers >= 0, "num_workers", self.num_workers, "must not be negative")
        if self.weights:
            each = f"must be a number for each of the {len(self.data)} --data"
            check(len(self.weights) == len(self.data), "weights", self.weights, each)
            positive = all(0 < weight < math.inf for weight in self.weights)
            check(positive, "weights", self.weights, "must be positive and finite")


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenise text into a folder of shards, which --data of llama_torch.train takes."""

    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt .md .jsonl .parquet); none = Python's own help topics."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    out: str = ""
    """Folder to write; if an earlier run of this was stopped there, it goes on."""
    workers: int = 0
    """Processes that tokenise; 0 = one for each CPU core."""
    shard_tokens: int = 1 << 26
    """Tokens in a shard."""
    verify: str = ""
    """Folder of shards to compare with their checksums, instead of writing one."""

    def __post_init__(self) -> None:
        check_positive(self, "shard_tokens")
        check(self.workers >= 0, "workers", self.workers, "must not be negative")
        needed = "is needed: name the folder to write (or one to check, with --verify)"
        check(bool(self.out or self.verify), "out", self.out, needed)


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
    """Processes that share the products of each block (tensor parallelism)."""

    def __post_init__(self) -> None:
        check(self.fsdp >= 0, "fsdp", self.fsdp, "must not be negative")
        check_positive(self, "tp")


@dataclass(frozen=True)
class TrainConfig:
    """Train a Llama on text and leave a Hugging Face model directory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    config: str = ""
    """TOML file of settings: these flags' names as keys, in any section; flags win over it."""
    out: str = ""
    """Run directory; empty = the next free runs/N (with --resume: the latest)."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with its own settings."""

    steps: int = 240
    """Optimizer steps."""
    batch_size: int = 4
    """Windows in one forward pass."""
    grad_accum: int = 1
    """Forward passes summed into one step; several processes share out a step's windows."""
    seed: int = 0
    """Seed of initialisation, data order and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and activations; auto = bfloat16 where the hardware computes it. The
    optimizer keeps float32 weights either way, and checkpoints hold those."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """torch.set_float32_matmul_precision. On a CPU with AMX too, medium multiplies float32 in
    bfloat16, all but products of a few rows."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile for the blocks: auto = on a GPU."""
    recompute: Literal["auto", "none", "cheap", "all"] = "auto"
    """Activations to compute again in the backward pass instead of keeping them: cheap = all but
    matrix products and attention; all = everything inside a block; auto = cheap when compiled."""
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
        check_positive(self, "steps", "batch_size", "grad_accum", "log_every", "eval_every")
        check_positive(self, "save_every", "keep_last")
        for name in ("eval_batches", "sample_every", "verify_every"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must lie between 0 and 2^32 - 1")
        # transformers refuses to load any other shape, and a run must load everywhere.
        check(
            self.model.dim % self.model.n_heads == 0,
            "dim",
            self.model.dim,
            f"must be a multiple of --n-heads {self.model.n_heads}",
        )
        check_text("sample_prompt", self.sample_prompt)

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the losses: what a resumed run must share."""
        flat = dataclasses.asdict(self)
        reporting = ("log_every", "eval_every", "eval_batches", "sample_every", "sample_prompt")
        running = ("config", "out", "resume", "device", "save_every", "profile", "dry_run")
        # Whoever stopped at a bad step may want to continue over it.
        keeping = ("keep_last", "keep_best", "skip_bad_steps", "verify_every")
        for name in (*running, *keeping, "compile", "recompute", "parallel", *reporting):
            del flat[name]
        for name in ("cache_dir", "num_workers", "data", "text_field"):
            del flat["data"][name]  # the text itself is compared by its hash
        identity: dict[str, Any] = json.loads(json.dumps(flat))
        return identity


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write it again") from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object; InputError names its source."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not JSON ({error}); write it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: is not a JSON object; write it again")
    return value
