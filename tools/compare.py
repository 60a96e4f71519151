"""Run a checkpoint through the NumPy oracle and the torch model and say where they part.

``python tools/compare.py ckpt.safetensors``; exit code 0: within bounds, 1: not, 2: bad input.

The oracle computes twice: in float64, which counts as exact, and in the dtype under test,
which says how much error honest rounding makes. The torch model may be FACTOR times worse.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
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
from llama_torch.config import OptimConfig
from llama_torch.data import documents
from llama_torch.device import pick_device
from llama_torch.model import Llama
from llama_torch.optim import make_adamw
from llama_torch.step import Precision, accumulate, split_window, update
from llama_torch.tokenizer import VOCAB_SIZE, gpt2
from llama_torch.trace import traced_activations
from reference_np import optim
from reference_np.checkpoint import Checkpoint
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.model import forward
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.ops import Array
from reference_np.tolerances import (
    LAMBDA,
    LOGIC,
    UNIT_ROUNDOFF,
    Errors,
    composed_bound,
    errors,
    kl_per_token,
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
    grads: bool = False
    """Compare a training step as well: loss, every gradient, and what AdamW makes of them."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise llama_torch.config.InputError(f"--tokens must be positive, got {self.tokens}")
        if self.grads and self.tokens < 2:
            raise llama_torch.config.InputError("--grads needs --tokens 2 or more, to predict one")


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


# The paper's settings at the peak of the schedule, where a step is largest.
STEP = optim.Hyper(warmup_steps=0)


def step_names(model: LlamaConfig) -> list[str]:
    """Return what a training step leaves, in the order it is made."""
    parameters = list(parameter_shapes(model))
    return [
        "loss",
        "grad_norm",
        *(f"grad {name}" for name in parameters),
        *(f"step {name}" for name in parameters),
    ]


def oracle_step(checkpoint: Checkpoint, tokens: Array) -> Activations:
    """Take the oracle's training step on the tokens, in the checkpoint's dtype."""
    params = dict(checkpoint)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    state = optim.init_state(params)
    new, _, metrics = optim.train_step(params, state, [batch], checkpoint.config, STEP)
    return _step_values(metrics.loss, metrics.grad_norm, metrics.grads, params, new)


def torch_step(model: Llama, tokens: Array) -> Activations:
    """Take the same step with the functions that the trainer runs."""
    window = torch.from_numpy(tokens)
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    before = {name: p.detach().cpu().numpy().copy() for name, p in named.items()}
    settings = OptimConfig()
    optimizer = make_adamw(model, settings)
    weight = model.head_weight
    precision = Precision(weight.device, weight.dtype)
    loss = accumulate(model, [split_window(window)], precision)
    grads = {name: p.grad.cpu().numpy().copy() for name, p in named.items() if p.grad is not None}
    norm = update(model, optimizer, lr=settings.lr, grad_clip=settings.grad_clip)
    after = {name: p.detach().cpu().numpy() for name, p in named.items()}
    return _step_values(loss.item(), norm.item(), grads, before, after)


def _step_values(
    loss: float, norm: float, grads: Activations, before: Activations, after: Activations
) -> Activations:
    """Name a step's results; matrices as [1, rows, columns], so that a wrong row shows."""

    def rows(value: Array) -> Array:
        return value.reshape((1, *value.shape) if value.ndim == 2 else (1, 1, -1))

    found = {"loss": np.full((1, 1, 1), loss), "grad_norm": np.full((1, 1, 1), norm)}
    found |= {f"grad {name}": rows(g) for name, g in grads.items()}
    # The change, in float64: beside the parameter itself it would vanish.
    found |= {
        f"step {name}": rows(after[name].astype(np.float64) - before[name]) for name in before
    }
    return found


def step_slack(
    checkpoint: Checkpoint, stepped: Activations, exact: Activations, baseline: Activations
) -> dict[str, Errors]:
    """Return what a training step's bounds inherit from errors that have rows of their own.

    The gradient norm is one sum over all parameters in the dtype under test; the oracle sums
    it in float64, so that its float32 run says nothing of that error. Clipping hands on what
    there was of it, up to its bound. AdamW's first step is g / (|g| + eps): an element's error
    grows by up to 1 / eps where g is small, and of the largest such element the plain run
    shows one draw only; it inherits the gradient's bound.
    """
    n = sum(math.prod(shape) for shape in parameter_shapes(checkpoint.config).values())
    summed = LAMBDA * math.sqrt(n) * UNIT_ROUNDOFF[checkpoint.dtype.name]
    norm = float(exact["grad_norm"].item())
    handed_on = summed
    if "grad_norm" in stepped:
        handed_on = min(summed, errors(stepped["grad_norm"], exact["grad_norm"]).worst)
    slack = {"grad_norm": Errors(summed, summed, summed)}
    for name in parameter_shapes(checkpoint.config):
        grad, step = exact[f"grad {name}"], exact[f"step {name}"]
        plain = errors(baseline[f"grad {name}"], grad)
        wrong = composed_bound(plain, checkpoint.dtype.name).worst * np.abs(grad).max()
        wrong *= min(1.0, STEP.grad_clip / norm) / STEP.eps
        largest = np.abs(step).max() / STEP.lr
        grown = float(wrong / largest) if largest > 0 else 0.0
        slack[f"step {name}"] = Errors(handed_on, handed_on + grown, handed_on)
    return slack


def compare(
    names: Sequence[str],
    actual: Activations,
    exact: Activations,
    baseline: Activations,
    dtype: str,
    slack: Mapping[str, Errors] = MappingProxyType({}),
) -> Iterator[Row]:
    """Yield a row for every expected name, in order; a missing one does not hold.

    ``slack`` is added to the bounds of the names in it.
    """
    nowhere = Errors(*[np.inf] * 3)
    for name in names:
        if name not in actual or name not in exact or name not in baseline:
            yield Row(name, nowhere, nowhere, holds=False)
            continue
        error = errors(actual[name], exact[name])
        if dtype == "float64":
            bound = Errors(LOGIC, LOGIC, LOGIC)
        else:
            plain = composed_bound(errors(baseline[name], exact[name]), dtype)
            more = slack.get(name, Errors(0.0, 0.0, 0.0))
            bound = Errors(*(a + b for a, b in zip(plain, more, strict=True)))
        yield Row(name, error, bound, error.within(bound))


def show(rows: Sequence[Row], console: Console, what: str, part: str) -> None:
    """Print the table: relative errors beside their bounds, in 80 columns.

    ``of bound`` is the largest of all kinds of error as a share of its own bound.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(what, overflow="fold", min_width=23)
    for heading in ("rms", "bound", f"worst {part}", "bound", "of bound"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    for row in rows:
        kinds = (row.error.rms, row.bound.rms, row.error.token, row.bound.token)
        table.add_row(
            row.name.replace(" model.", " ").removesuffix(".weight"),
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


def verdict(rows: Sequence[Row], expected: int, what: str = "activations") -> tuple[str, int]:
    """Return the last line and the exit code; agreement over nothing is not agreement."""
    failed = [row for row in rows if not row.holds]
    held = len(rows) - len(failed)
    if failed:
        first = failed[0]
        worst = max(first.error)
        why = "missing or not finite" if np.isinf(worst) else f"error {worst:.1e}"
        return (
            f"FAIL: {held} of {expected} {what} within bounds; first divergence at "
            f"{first.name} ({why})"
        ), 1
    if held != expected or not rows:
        return f"FAIL: {held} of {expected} {what} compared", 1
    tightest = max(rows, key=lambda row: row.error.share(row.bound))
    return (
        f"PASS: {held} of {expected} {what} within bounds; the closest is {tightest.name} "
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
    low = checkpoint if config.dtype == "float64" else Checkpoint(config.ckpt, config.dtype)
    exact = oracle_activations(checkpoint, tokens)
    baseline = exact if low is checkpoint else oracle_activations(low, tokens)
    actual = traced_activations(torch_model, tokens)
    rows = list(compare(list(activation_axes(low.config)), actual, exact, baseline, config.dtype))
    console = Console(highlight=False)
    if config.grads and not console.is_terminal:
        console.width = 100
    console.print(
        f"{config.ckpt}: oracle against torch ({config.against or 'the same weights'}), "
        f"{config.dtype} on {device}, {tokens.size} tokens; errors relative to the exact value",
        soft_wrap=True,
        markup=False,
    )
    show(rows, console, "activation", "token")
    console.print(describe_logits(actual, exact), soft_wrap=True)
    expected = len(activation_axes(low.config))
    if config.grads:
        exact = oracle_step(checkpoint, tokens)
        baseline = exact if low is checkpoint else oracle_step(low, tokens)
        names = step_names(low.config)
        stepped = torch_step(torch_model, tokens)
        slack = step_slack(low, stepped, exact, baseline)
        step_rows = list(compare(names, stepped, exact, baseline, config.dtype, slack))
        show(step_rows, console, "training step", "row")
        rows += step_rows
        expected += len(names)
    line, code = verdict(rows, expected, "quantities" if config.grads else "activations")
    console.print(
        line, soft_wrap=True, markup=False, style="bold green" if code == 0 else "bold red"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
