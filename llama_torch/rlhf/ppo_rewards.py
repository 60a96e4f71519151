"""Rewards and advantages of answers that were drawn together (section 3.2.3), without gradients.

A mask is True at the positions whose next token was drawn. All is computed in float64 on the CPU:
these are a few numbers a token.

Suffixes: B answer, T position, G answers to a prompt.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.parallel import Parallel

WHITEN_EPS = 1e-8  # under the root


class Moments(NamedTuple):
    """How many numbers, their mean and the sum of their squared deviations."""

    n: float
    mean: float
    squares: float


def moments(values: Tensor, mask: Tensor) -> Moments:
    """Return the moments of the values [...] where the mask [...] is True.

    Deviations are from the first value, then from their mean: those of equal values are exactly 0.
    """
    real = values[mask].double()
    if not len(real):
        return Moments(0.0, 0.0, 0.0)
    offsets = real - real[0]
    shift = offsets.mean()
    squares = (offsets - shift).square().sum()
    return Moments(len(real), (real[0] + shift).item(), squares.item())


def join_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the numbers of all parts (Chan et al. 1979)."""
    filled = [part for part in parts if part.n]
    n, mean, squares = filled[0] if filled else Moments(0.0, 0.0, 0.0)
    for part in filled[1:]:
        total, difference = n + part.n, part.mean - mean
        squares += part.squares + difference**2 * n * part.n / total
        n, mean = total, mean + difference * part.n / total
    return Moments(n, mean, squares)


def whiten(values: Tensor, mask: Tensor, parallel: Parallel) -> Tensor:
    """Return ``(x - m) / sqrt(v + 1e-8)`` [...] where the mask is True, else 0.

    m and v are the mean and the variance over all processes. Collective.
    """
    own = torch.tensor(moments(values, mask), dtype=torch.float64)
    parts = gathered(own, parallel).tolist()
    of = join_moments([Moments(*part) for part in parts])
    scale = 1.0 / math.sqrt((of.squares / of.n if of.n else 0.0) + WHITEN_EPS)
    return ((values.double() - of.mean) * scale).where(mask, 0)


def gathered(own_N: Tensor, parallel: Parallel) -> Tensor:
    """Return the numbers [N] of every data-parallel rank: float64 [ranks, N]. Collective."""
    each = own_N.new_zeros(parallel.data_size, len(own_N))
    each[parallel.data_rank] = own_N
    device = "cuda" if parallel.data_size > 1 and torch.cuda.is_available() else "cpu"
    return parallel.all_reduce_sum_(each.to(device)).cpu()


def kl_rewards(
    scores_B: Tensor, log_p_BT: Tensor, log_ref_BT: Tensor, mask_BT: Tensor, beta: float
) -> Tensor:
    """Return each token's reward [B, T]: -beta (log pi - log pi_0), and the score at the last."""
    rewards_BT = (-beta * (log_p_BT - log_ref_BT)).where(mask_BT, 0)
    last_B = last_drawn(mask_BT)
    rewards_BT[torch.arange(len(last_B)), last_B] += scores_B
    return rewards_BT


def last_drawn(mask_BT: Tensor) -> Tensor:
    """Return the position [B] before each answer's last token; every answer has one token."""
    positions = torch.arange(mask_BT.shape[1])
    return (positions * mask_BT).amax(1)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [B, T] (Schulman et al. 2016, eq. 16); 0 where masked.

    The answer has ended after its last token, whether by an end token or by its limit.
    """
    values_BT = values_BT.where(mask_BT, 0)
    advantages_BT = torch.zeros_like(values_BT)
    next_advantage_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(mask_BT.shape[1])):
        real_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = advantage_B.where(real_B, 0)
        next_advantage_B = advantage_B.where(real_B, next_advantage_B)
        next_value_B = values_BT[:, t].where(real_B, next_value_B)
    return advantages_BT, advantages_BT + values_BT


def group_advantages(rewards_BG: Tensor) -> Tensor:
    """Return ``(r - mean) / std`` of each prompt's answers [B, G] (Shao et al. 2024, section 4.1).

    std is of n, and no epsilon is added: equal rewards have exactly 0.
    """
    offsets = rewards_BG - rewards_BG[:, :1]
    deviations = offsets - offsets.mean(1, keepdim=True)
    deviation = deviations.square().mean(1, keepdim=True).sqrt()
    return deviations / deviation.where(deviation > 0, 1)
