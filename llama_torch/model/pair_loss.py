"""The reward model's losses and their gradients, by hand (sections 3.2.1 and 3.2.2).

Only the scores at the last tokens have a gradient, so that the head is computed there alone.

Suffixes: B row (an answer with its conversation), P pair, T position, D dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def last_hidden(hidden_BTD: Tensor, last_B: Tensor) -> Tensor:
    """Return each row's hidden state [B, D] at ``last_B``, its last token; a negative one is 0."""
    rows = torch.arange(len(last_B), device=last_B.device)
    return hidden_BTD[rows, last_B.clamp(min=0)]


def scores_at(hidden_BTD: Tensor, head_1D: Tensor, last_B: Tensor) -> Tensor:
    """Return the scores [B] of rows, in float32 or wider: the head's product at the last token."""
    return _upcast(last_hidden(hidden_BTD, last_B)) @ _upcast(head_1D)[0]


def pair_losses(chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``-log sigmoid(r_c - r_r - m)`` [P] (eq. 2; eq. 1 for m = 0), and its derivative.

    The derivative [P] is that by r_c, ``-sigmoid(-(r_c - r_r - m))``; by r_r it is the negative.
    All three have one axis: a margin [P] beside scores [P, 1] would become [P, P].
    """
    assert chosen_P.shape == rejected_P.shape == margins_P.shape
    assert chosen_P.ndim == 1
    gap_P = chosen_P - rejected_P - margins_P
    return -F.logsigmoid(gap_P), -torch.sigmoid(-gap_P)


def safety_losses(scores_B: Tensor, safe_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the auxiliary safety loss [B] of each answer (section 3.2.2), and its derivative.

    It is binary cross-entropy on the score's sign: ``-log sigmoid(r)`` where ``safe_B`` is true,
    and ``-log sigmoid(-r)`` elsewhere.
    """
    assert scores_B.shape == safe_B.shape
    sign_B = safe_B.to(scores_B.dtype) * 2 - 1
    return -F.logsigmoid(sign_B * scores_B), -sign_B * torch.sigmoid(-sign_B * scores_B)


@torch.no_grad()
def backward_scores(
    hidden_BTD: Tensor, head_1D: Tensor, last_B: Tensor, d_scores_B: Tensor
) -> None:
    """Run the backward pass of scores through head and model, from their gradient [B].

    Gradients are added to every parameter's ``grad``, the head's first.
    """
    wide_BD = _upcast(last_hidden(hidden_BTD, last_B))
    d_head_1D = (d_scores_B[None] @ wide_BD).to(head_1D.dtype)
    head_1D.grad = d_head_1D if head_1D.grad is None else head_1D.grad.add_(d_head_1D)
    d_hidden_BTD = torch.zeros_like(hidden_BTD)
    rows = torch.arange(len(last_B), device=last_B.device)
    d_last_BD = d_scores_B[:, None] * _upcast(head_1D)
    d_hidden_BTD[rows, last_B.clamp(min=0)] = d_last_BD.to(hidden_BTD.dtype)
    hidden_BTD.backward(d_hidden_BTD)


def _upcast(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
