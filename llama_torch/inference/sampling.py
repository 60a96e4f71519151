"""Sampling of the next token from logits, each row of a batch with its own settings.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p. The
specification is reference_np/sampling.py. Suffixes: B row, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import SamplingConfig


class SamplingTensors(NamedTuple):
    """Sampling settings of a batch's rows as tensors, each [B, 1]; see SamplingConfig."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor

    @classmethod
    def from_configs(
        cls, rows: Sequence[SamplingConfig], device: torch.device
    ) -> "SamplingTensors":
        """Stack the settings of the rows, in order: top_k as int64, the others as float64."""
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
        """Return the settings of the rows ``rows``, int64 [n]."""
        return SamplingTensors(*(setting[rows] for setting in self))


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty_B1: Tensor) -> Tensor:
    """Return the logits [B, V] with the repetition penalty [B, 1] on seen tokens, in float64.

    ``seen_BV`` is bool. A positive logit is divided by the penalty and a negative one multiplied,
    as Hugging Face does; the paper (Keskar et al. 2019, section 4.1) divides all, which favours
    repetition where logits are negative.
    """
    logits_BV = logits_BV.double()
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def removes_tokens(row: SamplingConfig) -> bool:
    """Return whether a row's settings leave tokens out of the distribution to draw from."""
    return row.temperature == 0 or row.top_k > 0 or row.top_p < 1 or row.min_p > 0


def all_probabilities(logits_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """Return ``softmax(l / temperature)`` [B, V] in float64: where no row's settings remove tokens.

    Without their sorting, which takes longer than all else.
    """
    logits_BV = logits_BV.double()
    # Differences from the largest logit: 0 and below, so that no temperature overflows exp.
    return ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B1).softmax(-1)


def token_probabilities(logits_BV: Tensor, settings: SamplingTensors) -> Tensor:
    """Return the probabilities [B, V] to draw from, in float64, given logits [B, V].

    top-k keeps the k most probable tokens; top-p, of those, the smallest set of the most probable
    whose sum is at least p of theirs (Holtzman et al. 2020); min-p the tokens whose probability is
    at least min_p times the largest (Nguyen et al. 2024). Ties are broken by the lower id. The most
    probable token is always kept; at temperature 0 it has probability 1.
    """
    # float64: in float32 the cumulative sum of 50,257 probabilities reaches 1 before its end.
    ordered, order = torch.sort(logits_BV.double(), dim=-1, descending=True, stable=True)
    greedy = settings.temperature == 0
    # Differences from the largest logit: 0 and below, so that no temperature overflows exp.
    ordered = (ordered - ordered[:, :1]) / torch.where(greedy, 1.0, settings.temperature)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    n_kept = torch.where(greedy, 1, settings.top_k)
    ordered = ordered.masked_fill((n_kept > 0) & (rank >= n_kept), -torch.inf)
    probs = ordered.softmax(-1)
    mass_before = probs.cumsum(-1) - probs  # the sum of the more probable tokens
    is_cut = (settings.top_p < 1) & (mass_before >= settings.top_p)
    is_cut |= probs < settings.min_p * probs[:, :1]
    probs = probs.masked_fill(is_cut, 0.0)
    probs /= probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, probs)


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the token ids [B] at which the rows' cumulative probabilities exceed ``uniform``.

    ``probs_BV`` need not sum to exactly 1; ``uniform_B`` are draws from [0, 1), float64 [B].
    """
    cumulative = probs_BV.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may make the product equal to the total, which no cumulative sum exceeds.
    target = torch.minimum(uniform_B[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def log_probability(probs_BV: Tensor | None, ids_B: Tensor) -> Tensor:
    """Return the logarithms [B] of the ids' probabilities, float64; 0, all certain, for None."""
    if probs_BV is None:
        return torch.zeros(ids_B.shape, dtype=torch.float64, device=ids_B.device)
    return probs_BV.gather(1, ids_B[:, None])[:, 0].log()
