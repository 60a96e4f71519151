"""What a training step minimises: the seam between the accumulation of gradients and a loss.

``accumulate`` runs the model on micro-batches and hands the hidden states to an Objective, which
adds to every gradient. A loss is a sum over the whole step divided by a number counted over the
whole step, so that the split into micro-batches and processes changes rounding alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.llama import Llama
from ..model.loss import IGNORE_INDEX, backward_loss, count_valid, loss_sum
from .bad_steps import largest_loss
from .batch import Batch

# How the measures of a step or a validation are printed, by name; the others with three decimals.
FORMATS = {
    "perplexity": ",.1f",
    **dict.fromkeys(("accuracy", "clipped", "ended"), ".1%"),
    **{"length": ".1f", "mismatch": ".1e"},
}


class Measured(NamedTuple):
    """What a validation measured."""

    loss: float
    values: Mapping[str, float]  # beside the loss, by the names that TensorBoard has
    table: Sequence[str] = ()  # lines that the end of a run prints


class Objective(Protocol):
    """A loss, and what is measured beside it.

    Its sums over micro-batches are divided by ``counts`` over all of a step's.
    """

    model_class: type[Llama]  # of the models that it trains
    names: Sequence[str]  # of what each step measures beside the loss
    latest: Tensor  # float64 [len(names)], what the last step measured, over all processes

    def counts(self, batch: Batch) -> Sequence[int]:
        """Return what the loss's terms are means over; a step with none of the first is refused."""
        ...

    def backward(
        self, hidden_BTD: Tensor, head: Tensor, batch: Batch, divisors: Sequence[float]
    ) -> Tensor:
        """Run the backward pass of a micro-batch; return loss and measures, float64 [1 + names].

        hidden_BTD  the model's normed residual stream, with its autograd graph.
        head        the model's last matrix.
        divisors    the step's ``counts``; what is returned is divided by them, so that those of
                    micro-batches add up to the step's.

        Gradients are added to every parameter's ``grad``, the head's before the others.
        """
        ...

    def sums(self, hidden_BTD: Tensor, head: Tensor, batch: Batch) -> Tensor:
        """Return a validation batch's sums, float64 [S], which add up over batches."""
        ...

    def measured(self, sums: Sequence[float]) -> Measured:
        """Return what the sums [S] of all validation batches say."""
        ...

    def largest_loss(self, vocab_size: int) -> float:
        """Return the largest loss of a step that has not exploded."""
        ...


class TokenLoss:
    """Next-token cross-entropy over the valid targets, in nats per token; implements Objective."""

    model_class = Llama
    names: Sequence[str] = ()

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss, self.latest = z_loss, torch.zeros(0, dtype=torch.float64)

    def counts(self, batch: Batch) -> Sequence[int]:
        """Return the number of valid targets."""
        return (count_valid(batch.targets),)

    def backward(
        self, hidden_BTD: Tensor, head: Tensor, batch: Batch, divisors: Sequence[float]
    ) -> Tensor:
        """Run the backward pass of the loss over ``divisors``, in chunks of logits."""
        (divisor,) = divisors
        return backward_loss(hidden_BTD, head, batch.targets, divisor, self.z_loss)[None]

    def sums(self, hidden_BTD: Tensor, head: Tensor, batch: Batch) -> Tensor:
        """Return the loss's sum, without z-loss, and the number of targets: float64 [2]."""
        loss = loss_sum(hidden_BTD, head, batch.targets)
        return torch.stack([loss, (batch.targets != IGNORE_INDEX).sum().double()])

    def measured(self, sums: Sequence[float]) -> Measured:
        """Return the mean loss, and its perplexity."""
        loss, n_valid = sums
        return Measured(loss / n_valid, {"perplexity": perplexity(loss / n_valid)})

    def largest_loss(self, vocab_size: int) -> float:
        """Return a multiple of the loss of a uniform prediction, with its z-loss."""
        return largest_loss(vocab_size, self.z_loss)


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats a token, or of 700 where it is more."""
    return math.exp(min(loss, 700.0))  # exp overflows just above


def shown(values: Mapping[str, float], before: str = "  ") -> str:
    """Return measures as the end of a line, each with its name, and ``before`` before that."""
    parts = (f"{name} {value:{FORMATS.get(name, '.3f')}}" for name, value in values.items())
    return "".join(before + part for part in parts)
