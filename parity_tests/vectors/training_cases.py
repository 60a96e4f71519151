"""The golden vectors' training steps: losses, gradients and updates."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from llama_parity.comparison.trace_format import Step
from reference_np.grad import Batch
from reference_np.ops import IGNORE
from reference_np.optim import Hyperparameters

from .case_parts import CONFIGS, Case, packed, tokens_of

CONSTANT = Hyperparameters(
    lr=0.0625, warmup_steps=0, steps=10, final_lr_ratio=1.0, weight_decay=0.0, grad_clip=1e9
)


def batch(name: str, model: str, rows: int, length: int, ignored: int = 0, **given: Any) -> Batch:
    """Return a micro-batch whose first ``ignored`` targets of each row are no targets."""
    tokens = tokens_of(f"{name}/inputs", CONFIGS[model], rows, length)
    targets = tokens_of(f"{name}/targets", CONFIGS[model], rows, length)
    targets[:, :ignored] = IGNORE
    return Batch(tokens, targets, **given)


def training(
    name: str, model: str, about: str, *batches: Batch, steps: int = 0, **changed: Any
) -> Case:
    """Return a case of gradients, or of so many optimizer steps."""
    if not batches:
        batches = (batch(name, model, 2, 4),)
    taken = [Step([*batches])]
    for s in range(1, steps):
        taken.append(Step([batch(f"{name}/{s}", model, 2, 4)]))
    return Case(
        *(f"training-{name}", model, about),
        steps=tuple(taken),
        hyperparameters=replace(CONSTANT, **changed),
        update=steps > 0,
    )


def gradient_cases() -> Iterable[Case]:
    for model in ("trained", "trained-mha", "trained-mqa", "trained-tied", "trained-two-layers"):
        yield training(f"gradients-{model}", model, "loss and gradients of one batch")
    ignored = batch("ignored", "trained", 2, 5, ignored=2)
    yield training("ignored", "trained", "targets of -100", ignored)
    unequal = batch("unequal", "trained", 2, 4), batch("few", "trained", 1, 5, ignored=4)
    yield training("micro-batches", "trained", "eight targets and one", *unequal)
    yield training("z-loss", "trained", "with z-loss 0.25", z_loss=0.25)
    same = Batch(np.array([[4, 4, 4, 9]]), np.array([[4, 4, 9, 4]]))
    yield training("repeated", "trained-mha", "a token three times", same)
    positions, mask = packed((2, 3))
    one = batch("packed", "trained", 1, 5, positions=positions, mask=mask)
    yield training("packed", "trained", "two packed documents", one)


def update_cases() -> Iterable[Case]:
    yield training("step", "trained", "a step, not clipped", steps=1)
    yield training("clipped", "trained", "a step, clipped to 0.5", steps=1, grad_clip=0.5)
    yield training(
        "loose", "trained", "a step, clipping at 64: not reached", steps=1, grad_clip=64.0
    )
    yield training("decay", "trained", "a step with weight decay 0.5", steps=1, weight_decay=0.5)
    yield training("tied", "trained-tied", "a step of a tied model", steps=1, weight_decay=0.25)
    yield training("warmup", "trained", "two steps of a warmup of four", steps=2, warmup_steps=4)
    unequal = batch("unequal", "trained", 2, 4), batch("few", "trained", 1, 5, ignored=4)
    yield training(
        "everything",
        "trained",
        "micro-batches, z-loss, clipping, decay, warmup, two steps",
        *unequal,
        steps=2,
        warmup_steps=2,
        z_loss=0.25,
        grad_clip=0.25,
        weight_decay=0.5,
    )
