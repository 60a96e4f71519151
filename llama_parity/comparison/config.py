"""The settings of a comparison."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from llama_common.errors import InputError

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
    template: str = ""
    """Chat template of --sft: a Jinja file, or llama2; empty = the checkpoint's own."""
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
        if self.template and not self.sft:
            raise InputError("--template writes the conversations of --sft; give that too")
        for name in ("prompt", "file", "ids") if self.sft else ():
            if getattr(self, name):
                raise InputError(f"--{name}: --sft has its own tokens; leave one of them out")
        if self.steps < 0:
            raise InputError(f"--steps must not be negative, got {self.steps}")
