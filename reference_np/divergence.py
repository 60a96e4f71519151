"""Log-probabilities of sampled tokens, KL divergence and entropy, each with its gradient.

KL is KL(pi || pi_0), from the policy pi to the reference pi_0 that it started as (Llama 2, section
3.2.3, eq. 4). What stands in masked slots changes nothing, NaN and infinities included.

Axes: B batch, T position, V vocabulary, N the real tokens.
"""

import numpy as np

from . import ops
from .masked import select
from .ops import IGNORE, Array


def log_softmax(logits: Array) -> Array:
    """Return ``l - log Z`` over the last axis [..., V]."""
    log_p: Array = logits - ops.log_sum_exp(logits)
    return log_p


def log_probs(logits_BTV: Array, targets_BT: Array, temperature: float = 1.0) -> Array:
    """Return ``log softmax(l / temperature)[target]`` [B, T], and 0 where the target is IGNORE.

    ``temperature`` is that of sampling: the ratio of ``policy_loss`` is of the distribution the
    tokens came from. It divides the logits; dividing log-probabilities leaves sums other than 1.
    """
    real = targets_BT != IGNORE
    log_p_NV = log_softmax(logits_BTV[real] / temperature)
    out = np.zeros(targets_BT.shape, logits_BTV.dtype)
    out[real] = log_p_NV[np.arange(len(log_p_NV)), targets_BT[real]]
    return out


def log_probs_vjp(
    logits_BTV: Array, targets_BT: Array, d_out_BT: Array, temperature: float = 1.0
) -> Array:
    """Return d_logits = d_out (onehot(target) - p) / temperature [B, T, V], 0 where IGNORE."""
    real = targets_BT != IGNORE
    d_NV = -np.exp(log_softmax(logits_BTV[real] / temperature))
    d_NV[np.arange(len(d_NV)), targets_BT[real]] += 1.0
    d_logits = np.zeros_like(logits_BTV)
    d_logits[real] = d_NV * (d_out_BT[real][:, None] / temperature)
    return d_logits


def k1(log_p_BT: Array, log_ref_BT: Array, mask_BT: Array) -> Array:
    """Return ``log pi - log pi_0`` [B, T] of sampled tokens (Schulman 2020, k1).

    Its mean under pi is the KL: unbiased, and negative for some tokens.
    """
    return select(log_p_BT, mask_BT) - select(log_ref_BT, mask_BT)


def k1_vjp(log_p_BT: Array, log_ref_BT: Array, mask_BT: Array, d_out_BT: Array) -> Array:
    """Return d_log_p = d_out [B, T]. Its mean under pi is 0: as a loss k1 pulls nowhere."""
    return select(d_out_BT, mask_BT)


def k2(log_p_BT: Array, log_ref_BT: Array, mask_BT: Array) -> Array:
    """Return ``(log pi - log pi_0)^2 / 2`` [B, T] (Schulman 2020, k2); biased, never negative."""
    return k1(log_p_BT, log_ref_BT, mask_BT) ** 2 / 2


def k2_vjp(log_p_BT: Array, log_ref_BT: Array, mask_BT: Array, d_out_BT: Array) -> Array:
    """Return d_log_p = d_out (log pi - log pi_0) [B, T]; its mean under pi is the KL's gradient."""
    return select(d_out_BT, mask_BT) * k1(log_p_BT, log_ref_BT, mask_BT)


def k3(log_p_BT: Array, log_ref_BT: Array, mask_BT: Array) -> Array:
    """Return ``e^-k1 - 1 + k1`` [B, T] (Schulman 2020, k3): unbiased, and never negative.

    The ratio is pi_0 / pi, of the tokens that pi drew; pi / pi_0 would estimate another thing.
    """
    log_ratio = -k1(log_p_BT, log_ref_BT, mask_BT)
    estimate: Array = np.expm1(log_ratio) - log_ratio
    return estimate


def k3_vjp(log_p_BT: Array, log_ref_BT: Array, mask_BT: Array, d_out_BT: Array) -> Array:
    """Return d_log_p = d_out (1 - pi_0 / pi) [B, T].

    Its mean under pi is the gradient of KL(pi_0 || pi), not of the KL that k3 estimates.
    """
    log_ratio = -k1(log_p_BT, log_ref_BT, mask_BT)
    d_log_p: Array = -select(d_out_BT, mask_BT) * np.expm1(log_ratio)
    return d_log_p


def exact_kl(logits_BTV: Array, ref_logits_BTV: Array, mask_BT: Array) -> Array:
    """Return ``sum over v of p (log p - log p_0)`` [B, T]; 0 where masked (section 3.2.3, eq. 4).

    By enumeration of the vocabulary: what k1 and k3 are estimates of, at each token.
    """
    p, log_ratio = _compared(logits_BTV[mask_BT], ref_logits_BTV[mask_BT])
    return _scattered(np.sum(p * log_ratio, axis=-1), mask_BT)


def exact_kl_vjp(
    logits_BTV: Array, ref_logits_BTV: Array, mask_BT: Array, d_out_BT: Array
) -> Array:
    """Return d_logits = d_out p (log p - log p_0 - KL) [B, T, V]; 0 where masked."""
    p, log_ratio = _compared(logits_BTV[mask_BT], ref_logits_BTV[mask_BT])
    divergence = np.sum(p * log_ratio, axis=-1, keepdims=True)
    return _scattered(d_out_BT[mask_BT][:, None] * p * (log_ratio - divergence), mask_BT)


def entropy(logits_BTV: Array, mask_BT: Array) -> Array:
    """Return ``-sum over v of p log p`` [B, T] in nats; 0 where masked. Logits of -inf count 0."""
    p, log_p = _compared(logits_BTV[mask_BT])
    return _scattered(-np.sum(p * log_p, axis=-1), mask_BT)


def entropy_vjp(logits_BTV: Array, mask_BT: Array, d_out_BT: Array) -> Array:
    """Return d_logits = -d_out p (log p + entropy) [B, T, V]; 0 where masked."""
    p, log_p = _compared(logits_BTV[mask_BT])
    own = -np.sum(p * log_p, axis=-1, keepdims=True)
    return _scattered(-d_out_BT[mask_BT][:, None] * p * (log_p + own), mask_BT)


def _compared(logits_NV: Array, ref_NV: Array | None = None) -> tuple[Array, Array]:
    """Return p [N, V] and log p - log p_0, or log p without a reference; both 0 where p is 0."""
    log_p = log_softmax(logits_NV)
    p, possible = np.exp(log_p), log_p > -np.inf
    compared = select(log_p, possible)
    if ref_NV is not None:
        compared = compared - select(log_softmax(ref_NV), possible)
    return p, compared


def _scattered(values_N: Array, mask_BT: Array) -> Array:
    """Return the real tokens' values in their places [B, T, ...], 0 elsewhere."""
    out = np.zeros((*mask_BT.shape, *values_N.shape[1:]), values_N.dtype)
    out[mask_BT] = values_N
    return out
