"""One optimizer step: loss over micro-batches, clipping, AdamW. What the trainer runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import InputError
from .loss import backward_loss, count_valid
from .model import Llama


@dataclass(frozen=True)
class Precision:
    """The device and the dtype of its matrix products; parameters keep their own."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Run matrix products in ``dtype`` where that is lower than the parameters'."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)


class Batch(NamedTuple):
    """One micro-batch; positions and mask as in Llama.forward."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORE where nothing is to be learnt
    positions: Tensor | None = None  # int64 [B, T]
    mask: Tensor | None = None  # bool [B, T, T]

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor to ``device``."""
        return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]


def accumulate(
    model: Llama, batches: Sequence[Batch], precision: Precision, z_loss: float = 0.0
) -> Tensor:
    """Add the gradient of the step's loss to every parameter; return the loss, on the device.

    The loss is the mean over every valid target of every batch: each batch's sum is divided
    by the count of them all, so that splitting a step differently changes nothing but
    rounding. Raises InputError where no target is valid.
    """
    n_valid = sum(count_valid(batch.targets) for batch in batches)
    if n_valid == 0:
        raise InputError("a training step without a single valid target has no loss")
    total = torch.zeros((), dtype=torch.float64, device=precision.device)
    for batch in batches:
        tokens, targets, positions, mask = batch.to(precision.device)
        with precision.autocast():
            hidden, _ = model.model(tokens, positions=positions, mask=mask)
        total += backward_loss(
            hidden, model.head_weight, targets, n_valid, z_loss, precision.autocast
        )
    return total


def update(
    model: Llama, optimizer: torch.optim.Optimizer, *, lr: float, grad_clip: float
) -> Tensor:
    """Clip the accumulated gradients, step, and clear them; return their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    lr: float,
    grad_clip: float,
    precision: Precision,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step over ``batches``; return mean loss and gradient norm."""
    loss = accumulate(model, batches, precision, z_loss)
    return loss, update(model, optimizer, lr=lr, grad_clip=grad_clip)


def split_window(window: Tensor) -> Batch:
    """Cut [B, T + 1] into tokens [B, T] and the tokens that follow them."""
    return Batch(window[:, :-1], window[:, 1:])
