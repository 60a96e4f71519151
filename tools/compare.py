"""Run a checkpoint through the NumPy oracle and the torch model and say where they part.

``python tools/compare.py ckpt.safetensors``; exit code 0: within bounds, 1: not, 2: bad input.

The oracle computes twice: in float64, which counts as exact, and in the dtype under test,
which says how much error honest rounding makes. The torch model may be FACTOR times worse.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import llama_torch.config
import reference_np.config
from llama_torch import cli
from llama_torch.checkpoint import load_model
from llama_torch.data import documents
from llama_torch.device import pick_device
from llama_torch.tokenizer import VOCAB_SIZE, gpt2
from llama_torch.trace import traced_activations
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.naming import activation_axes
from reference_np.ops import Array
from reference_np.tolerances import (
    LOGIC,
    Errors,
    composed_bound,
    errors,
    kl_per_token,
    logic_error,
)

Activations = Mapping[str, Array]


@dataclass(frozen=True)
class CompareConfig:
    """Run a checkpoint through both backends and compare every activation."""

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A .safetensors file or a model directory."""
    against: str = ""
    """Other weights for the torch side (file or directory); empty = the same."""
    prompt: str = ""
    """Text to run; empty = the start of Python's help topics."""
    tokens: int = 64
    """Most tokens of the text to run."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of both sides; float64 leaves rounding nowhere to hide a bug."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the torch side runs."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise llama_torch.config.InputError(f"--tokens must be positive, got {self.tokens}")


class Row(NamedTuple):
    """The comparison of one activation."""

    name: str
    error: Errors
    bound: Errors
    holds: bool


def choose_tokens(config: CompareConfig, model: LlamaConfig) -> Array:
    """Return int64 [1, T]: the prompt, or real text that every machine has."""
    limit = min(config.tokens, model.max_seq_len)
    text = config.prompt or next(iter(documents((), "")))
    if model.vocab_size >= VOCAB_SIZE:
        ids = gpt2().encode_ordinary(text)[:limit]
    elif config.prompt:
        raise llama_torch.config.InputError(
            f"--prompt needs the GPT-2 encoding, and vocab_size {model.vocab_size} is too small "
            "for it; leave --prompt out"
        )
    else:  # a model of some other vocabulary: the text's bytes, folded into its ids
        ids = [byte % model.vocab_size for byte in text.encode()[:limit]]
    return np.array([ids], dtype=np.int64)


def oracle_activations(checkpoint: Checkpoint, tokens: Array) -> Activations:
    """Run the oracle in the checkpoint's dtype; return every named activation."""
    found: dict[str, Array] = {}
    forward(checkpoint, tokens, checkpoint.config, trace=found.__setitem__)
    return found


def compare(
    names: Sequence[str], actual: Activations, exact: Activations, baseline: Activations, dtype: str
) -> Iterator[Row]:
    """Yield a row for every expected activation, in model order; a missing one does not hold."""
    nowhere = Errors(*[np.inf] * 3)
    for name in names:
        if name not in actual or name not in exact:
            yield Row(name, nowhere, nowhere, holds=False)
            continue
        error = errors(actual[name], exact[name])
        if dtype == "float64":
            holds = logic_error(actual[name], exact[name]) <= LOGIC
            yield Row(name, error, Errors(LOGIC, LOGIC, LOGIC), holds)
        else:
            bound = composed_bound(errors(baseline[name], exact[name]), dtype)
            yield Row(name, error, bound, error.within(bound))


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table: relative errors beside their bounds, in 80 columns.

    ``of bound`` is the largest of all kinds of error as a share of its own bound.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("activation", no_wrap=True, min_width=23)
    for heading in ("rms", "bound", "worst token", "bound", "of bound"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    for row in rows:
        kinds = (row.error.rms, row.bound.rms, row.error.token, row.bound.token)
        table.add_row(
            row.name,
            *(f"{value:.1e}" for value in kinds),
            f"{row.error.share(row.bound):.2g}",
            "ok" if row.holds else "DIVERGES",
            style=None if row.holds else "bold red",
        )
    console.print(table)


def describe_logits(actual: Activations, exact: Activations) -> str:
    """Return a line about the predictions: KL per token and changed first choices."""
    if "logits" not in actual or actual["logits"].shape != exact["logits"].shape:
        return "logits cannot be compared"
    kl = kl_per_token(actual["logits"], exact["logits"])
    changed = int(np.sum(actual["logits"].argmax(-1) != exact["logits"].argmax(-1)))
    return (
        f"logits: KL {kl.mean():.1e} nats per token, {kl.max():.1e} at worst; "
        f"first choice differs at {changed} of {kl.size} positions"
    )


def verdict(rows: Sequence[Row], expected: int) -> tuple[str, int]:
    """Return the last line and the exit code; agreement over nothing is not agreement."""
    failed = [row for row in rows if not row.holds]
    held = len(rows) - len(failed)
    if failed:
        first = failed[0]
        worst = max(first.error)
        what = "missing or not finite" if np.isinf(worst) else f"error {worst:.1e}"
        return (
            f"FAIL: {held} of {expected} activations within bounds; first divergence at "
            f"{first.name} ({what})"
        ), 1
    if held != expected or not rows:
        return f"FAIL: {held} of {expected} activations compared", 1
    tightest = max(rows, key=lambda row: row.error.share(row.bound))
    return (
        f"PASS: {held} of {expected} activations within bounds; the closest is {tightest.name} "
        f"at {tightest.error.share(tightest.bound):.0%} of its bound"
    ), 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))
    except reference_np.config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(CompareConfig, argv)
    checkpoint = Checkpoint(config.ckpt, np.float64)
    tokens = choose_tokens(config, checkpoint.config)
    device = pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    torch_model = load_model(config.against or config.ckpt, dtype=dtype, device=device)
    if asdict(torch_model.config) != asdict(checkpoint.config):
        raise llama_torch.config.InputError(
            f"--against {config.against}: another architecture than {config.ckpt}; "
            "give weights of the same config"
        )
    exact = oracle_activations(checkpoint, tokens)
    baseline = exact
    if config.dtype != "float64":
        baseline = oracle_activations(Checkpoint(config.ckpt, config.dtype), tokens)
    actual = traced_activations(torch_model, tokens)
    names = list(activation_axes(checkpoint.config))
    rows = list(compare(names, actual, exact, baseline, config.dtype))
    console = Console(highlight=False)
    console.print(
        f"{config.ckpt}: oracle against torch ({config.against or 'the same weights'}), "
        f"{config.dtype} on {device}, {tokens.size} tokens; errors relative to the exact value",
        soft_wrap=True,
        markup=False,
    )
    show(rows, console)
    console.print(describe_logits(actual, exact), soft_wrap=True)
    line, code = verdict(rows, len(names))
    console.print(
        line, soft_wrap=True, markup=False, style="bold green" if code == 0 else "bold red"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
