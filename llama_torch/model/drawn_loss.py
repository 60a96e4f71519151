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


@torch.no_grad()
def log_probs(
    hidden_PD: Tensor, head_VD: Tensor, targets_P: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``log softmax(l / temperature)`` of the targets [P], and the entropies [P] in nats.

    hidden_PD  the normed residual stream at the positions before the drawn tokens.

    Both are in float32 or wider.
    """
    found = []
    for part in _parts(hidden_PD, len(head_VD)):
        logits_PV = _logits(hidden_PD[part], head_VD, temperature)
        found.append(_to_probabilities_(logits_PV, targets_P[part]))
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
        logits_PV = _logits(hidden, head_VD, temperature)
        found.append(_to_probabilities_(logits_PV, targets))
        scale = derivatives(found[-1][0], part).to(logits_PV.dtype) / temperature
        d_logits_PV = logits_PV.mul_(-scale[:, None])
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


def _logits(hidden_PD: Tensor, head_VD: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature [P, V], in float32 or wider."""
    logits_PV = F.linear(hidden_PD, head_VD)
    return logits_PV.to(_wide(logits_PV.dtype)).div_(temperature)


def _to_probabilities_(logits_PV: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by probabilities in place; return log p(target) and entropies [P].

    torch.log_softmax on a CPU adds up a row from one end to the other. Where one token is likely
    and 50,000 are alike, all of these are rounded the same way, and its results err by 1e-4 in
    float32; a sum in pairs leaves 1e-6.
    """
    shifted_PV = logits_PV.sub_(logits_PV.amax(-1, keepdim=True))
    target_P = shifted_PV.gather(1, targets_P[:, None])[:, 0]
    exp_PV = shifted_PV.exp()
    sum_P = exp_PV.sum(-1)
    log_z_P = sum_P.log()
    # Of a logit of minus infinity both factors are there: 0 times it counts 0.
    mean_P = shifted_PV.clamp_(min=torch.finfo(shifted_PV.dtype).min).mul_(exp_PV).sum(-1) / sum_P
    torch.div(exp_PV, sum_P[:, None], out=logits_PV)
    return target_P - log_z_P, log_z_P - mean_P


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
