"""Sample the next token from logits, for every row of a batch with its own settings.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p. The oracle is
reference_np.sampling. Suffixes: B row, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import SamplingConfig


class SamplingTensors(NamedTuple):
    """The settings of a batch's rows, each [B, 1]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor

    @classmethod
    def from_configs(
        cls, rows: Sequence[SamplingConfig], device: torch.device
    ) -> "SamplingTensors":
        """Stack the settings of each row, in the rows' order."""
        return cls(
            *(
                torch.tensor([[getattr(row, name)] for row in rows], device=device, dtype=dtype)
                for name, dtype in (
                    ("temperature", torch.float64),
                    ("top_k", torch.int64),
                    ("top_p", torch.float64),
                    ("min_p", torch.float64),
                    ("repetition_penalty", torch.float64),
                )
            )
        )

    def select_rows(self, rows: Tensor) -> "SamplingTensors":
        """Return the settings of the rows of index int64 [n]."""
        return SamplingTensors(*(setting[rows] for setting in self))


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty_B1: Tensor) -> Tensor:
    """Return logits [B, V] with the repetition penalty (Keskar et al. 2019, section 4.1), float64.

    A positive logit is divided by the penalty and a negative one multiplied, as every port of
    the method does: the paper divides, which favours repetition where logits are negative.
    """
    logits_BV = logits_BV.double()
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def token_probabilities(logits_BV: Tensor, settings: SamplingTensors) -> Tensor:
    """Return the distributions [B, V] to draw from, in float64.

    top-k keeps the k likeliest; top-p the smallest set of likeliest tokens among those that
    holds at least p of what they hold (Holtzman et al. 2020); min-p those at least that share
    as likely as the likeliest (Nguyen et al. 2024). Of equals, the lower ids come first. The
    likeliest is always kept, and alone at temperature 0.
    """
    # float64: in float32 the cumulative sum of 50,257 probabilities reaches 1 before its end.
    ordered, order = torch.sort(logits_BV.double(), dim=-1, descending=True, stable=True)
    greedy = settings.temperature == 0
    # The largest is 0 at any temperature, and cannot overflow.
    ordered = (ordered - ordered[:, :1]) / torch.where(greedy, 1.0, settings.temperature)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    n_kept = torch.where(greedy, 1, settings.top_k)
    ordered = ordered.masked_fill((n_kept > 0) & (rank >= n_kept), -torch.inf)
    probs = ordered.softmax(-1)
    mass_before = probs.cumsum(-1) - probs  # what the likelier tokens hold
    is_cut = (settings.top_p < 1) & (mass_before >= settings.top_p)
    is_cut |= probs < settings.min_p * probs[:, :1]
    probs = probs.masked_fill(is_cut, 0.0)
    probs /= probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, probs)


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the token [B] at which each row's cumulative sum exceeds its draw from [0, 1)."""
    cumulative = probs_BV.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may make the product equal to the whole sum, which no cumulative sum exceeds.
    target = torch.minimum(uniform_B[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
