"""Log-probabilities of drawn tokens and their backward pass, in chunks of positions.

Logits of one chunk are in memory at a time, as in loss.py. They are divided by the temperature
that the tokens were drawn with: the ratio of PPO is of the distribution that they came from.

Suffixes: P positions with a drawn token, D dim, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import CHUNK_BYTES, CHUNK_BYTES_CUDA

# From a chunk's log-probabilities and its slice of the positions to the derivatives by them.
Derivatives = Callable[[Tensor, slice], Tensor]


def log_probs(
    hidden_PD: Tensor, head_VD: Tensor, targets_P: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``log softmax(l / temperature)`` of the targets [P], and the entropies [P] in nats.

    hidden_PD  the normed residual stream at the positions before the drawn tokens.

    Both are in float32 or wider.
    """
    found = []
    for part in _parts(hidden_PD, len(head_VD)):
        log_p_PV = _log_softmax(hidden_PD[part], head_VD, temperature)
        found.append(_of_targets(log_p_PV, targets_P[part]))
    log_p_P, entropy_P = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_p_P, entropy_P


@torch.no_grad()
def backward_log_probs(
    hidden_PD: Tensor,
    head_VD: Tensor,
    targets_P: Tensor,
    temperature: float,
    derivatives: Derivatives,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities [P], entropies [P] and d_hidden [P, D] of a loss.

    The loss is known by its ``derivatives``. The head's gradient is added to its ``grad``; as
    d(log p) / d(logits) = (onehot(target) - p) / temperature.
    """
    found = []
    d_hidden_PD = torch.empty_like(hidden_PD)
    d_head_VD = torch.zeros_like(head_VD, dtype=_wide(head_VD.dtype))
    for part in _parts(hidden_PD, len(head_VD)):
        hidden, targets = hidden_PD[part], targets_P[part]
        log_p_PV = _log_softmax(hidden, head_VD, temperature)
        found.append(_of_targets(log_p_PV, targets))
        scale = derivatives(found[-1][0], part).to(log_p_PV.dtype) / temperature
        d_logits_PV = log_p_PV.exp_().mul_(-scale[:, None])
        d_logits_PV[torch.arange(len(targets), device=targets.device), targets] += scale
        d_logits_PV = d_logits_PV.to(head_VD.dtype)
        torch.mm(d_logits_PV, head_VD, out=d_hidden_PD[part])
        d_head_VD += d_logits_PV.T @ hidden
    add_gradient(head_VD, d_head_VD)
    log_p_P, entropy_P = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_p_P, entropy_P, d_hidden_PD


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add a gradient, rounded to the parameter's precision, to its ``grad``."""
    own = gradient.to(parameter.dtype)
    parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)


def _parts(hidden_PD: Tensor, vocab_size: int) -> Iterator[slice]:
    """Yield slices of the positions whose logits fit CHUNK_BYTES."""
    n_bytes = CHUNK_BYTES_CUDA if hidden_PD.is_cuda else CHUNK_BYTES
    size = max(1, n_bytes // (vocab_size * _wide(hidden_PD.dtype).itemsize))
    for first in range(0, len(hidden_PD), size):
        yield slice(first, min(first + size, len(hidden_PD)))


def _log_softmax(hidden_PD: Tensor, head_VD: Tensor, temperature: float) -> Tensor:
    logits_PV = F.linear(hidden_PD, head_VD)
    return torch.log_softmax(logits_PV.to(_wide(logits_PV.dtype)) / temperature, -1)


def _of_targets(log_p_PV: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    entropy_P = -(log_p_PV.exp() * log_p_PV).sum(-1)
    return log_p_PV.gather(1, targets_P[:, None])[:, 0], entropy_P


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
