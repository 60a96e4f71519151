"""The settings of a comparison."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from llama_common.errors import InputError, flag_of

LENGTH = 48  # of the prompt, unless another is asked for


@dataclass(frozen=True)
class CompareConfig:
    """Compare a checkpoint's computation with the NumPy oracle's, and name the bug if any."""

    command: ClassVar[str] = "python tools/compare.py"
    basic: ClassVar[str] = "ckpt against dtype prompt file tokens layers grads json html"

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A .safetensors or .gguf file, or a model directory."""
    against: str = "torch"
    """What is tested: torch, cuda or hf, each with :float64, :float32, :bfloat16 or :float16; a
    trace file; another checkpoint; a backend by its name, as package.module:object or as
    FILE.py:object."""
    beside: str = ""
    """A second trace of the same calls: how far its log-probabilities are from the first's. Of an
    engine that generates and one that trains, say, on one checkpoint."""
    dtype: Literal["", "float64", "float32", "bfloat16", "float16"] = ""
    """Precision under test; empty = float32, or the trace's. float64 leaves rounding nowhere to
    hide a bug."""
    prompt: str = ""
    """Text to run; empty = the start of Python's help topics."""
    file: str = ""
    """File with text to run."""
    ids: tuple[int, ...] = ()
    """Token ids to run."""
    tokens: tuple[int, ...] = ()
    """Lengths of the prompts, each a run of its own; empty = 48, or all given text or ids."""
    steps: int = 2
    """Tokens decoded one by one with the cache, after each prompt."""
    sft: str = ""
    """File of conversations to run and to learn from, in one step: labels, every token, gradients,
    the update. The checkpoint is a model directory with its tokenizer."""
    reward: str = ""
    """File of pairs of answers for a training step of a reward model: scores, loss, gradients, the
    update. The checkpoint is a reward model's directory with its tokenizer."""
    template: str = ""
    """Chat template of --sft or --reward: a Jinja file, or llama2; empty = the checkpoint's own."""
    margin: Literal["", "small", "large", "none"] = ""
    """Margin of --reward by strength, as the trainer's; empty = small."""
    safety_loss: float = 0.0
    """Weight of --reward's auxiliary loss on whether answers are safe; 0 = none."""
    layers: str = ""
    """A range like 3:5 (layers 3 and 4): compare these alone, on the other side's input to them."""
    grads: bool = False
    """Compare a training step as well: loss, every gradient, and AdamW's update."""
    all: bool = False
    """Show the activations within their bounds, too."""
    json: str = ""
    """File for the report as JSON; - = standard output, instead of the table."""
    html: str = ""
    """File for the report as a page (needs matplotlib)."""
    trace: str = ""
    """File for the oracle's own trace of the same calls, in the dtype under test."""
    diagnose: bool = True
    """Look for the known bugs that explain a divergence."""

    def __post_init__(self) -> None:
        if not self.ckpt:
            raise InputError("'' names no checkpoint; give a .safetensors file or its directory")
        if self.tokens and min(self.tokens) < 1:
            raise InputError(f"--tokens must be positive, got {min(self.tokens)}")
        if self.template and not self.sft and not self.reward:
            raise InputError(
                "--template writes the conversations of --sft or --reward; give one of these too"
            )
        for flag in ("sft", "reward"):
            for name in ("prompt", "file", "ids") if getattr(self, flag) else ():
                if getattr(self, name):
                    raise InputError(
                        f"--{name}: --{flag} has its own tokens; leave one of them out"
                    )
        self._check_reward()
        if self.steps < 0:
            raise InputError(f"--steps must not be negative, got {self.steps}")

    def _check_reward(self) -> None:
        """Raise InputError for flags of --reward without it, and for others' beside it."""
        if not self.reward:
            for name in ("margin", "safety_loss"):
                if getattr(self, name):
                    raise InputError(f"{flag_of(name)} is of a reward model; give --reward too")
            return
        if not 0 <= self.safety_loss < math.inf:
            raise InputError(
                f"--safety-loss must be zero or positive, and finite, got {self.safety_loss}"
            )
        for name in ("sft", "layers", "trace", "beside"):
            if getattr(self, name):
                raise InputError(
                    f"--{name}: --reward compares a training step alone; leave one of them out"
                )
        kind, _, suffix = self.against.partition(":")
        if kind not in ("torch", "cuda") or suffix not in ("", "float64", "float32"):
            raise InputError(
                f"--against {self.against}: --reward compares llama_torch's trainer in float32 or "
                "float64; give torch or cuda"
            )
        if suffix and self.dtype not in ("", suffix):
            raise InputError(
                f"--against {self.against} and --dtype {self.dtype} disagree; drop one"
            )
        if self.dtype in ("bfloat16", "float16"):
            raise InputError("--reward compares in float32 or float64; leave the precision out")
