"""Correct float32 attention kernels that differ in the order of their sums.

An attention kernel maps q [B, H, T, K], k and v [B, H, S, K] and mask [B, T, S] to [B, H, T, K];
every query must attend to at least one key.
``parity_tests.planted.honest_kernels:flash`` and so on are whole models, for compare.py's
--against; ``loops`` also adds the terms of its matrix products and means one after the other.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .port import Planted

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fused(backend: SDPBackend) -> Kernel:
    """Return one of torch's attention kernels."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, mask[:, None])

    return kernel


def scores_of(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return masked ``q k^T / sqrt(K)`` [B, H, T, S]."""
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~mask[:, None], -1e30)


def online_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention over blocks of 16 keys, last block first, with a running maximum.

    Where the maximum grows, the sums so far are scaled by the exponential of its change.
    """
    scores, top = scores_of(q, k, mask), torch.full_like(q[..., :1], -1e30)
    total, mixed = torch.zeros_like(top), torch.zeros_like(q)
    for part, values in reversed([*zip(scores.split(16, -1), v.split(16, -2), strict=True)]):
        higher = torch.maximum(top, part.amax(-1, keepdim=True))
        shrink, weights = (top - higher).exp(), (part - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed, top = mixed * shrink + weights @ values, higher
    return mixed / total


def sequential(backwards: bool) -> Kernel:
    """Return attention that adds the keys one after the other, the least accurate order."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = scores_of(q, k, mask)
        weights = (scores - scores.amax(-1, keepdim=True)).exp().numpy()
        terms = weights[..., None] * v.numpy()[:, :, None]
        total, mixed = (x[:, :, :, ::-1] if backwards else x for x in (weights, terms))
        # NumPy's cumulative sum adds one after the other, in float32.
        total, mixed = np.cumsum(total, axis=3)[..., -1:], np.cumsum(mixed, axis=3)[..., -1, :]
        return torch.from_numpy(mixed / total)

    return kernel


def with_kernel(kernel: Kernel) -> Planted:
    """Return the model of planted/port.py, a backend, with this attention kernel."""
    model = Planted()
    model.ops.attention_scores = lambda q, k: (q, k)
    model.ops.masked_softmax = lambda q_and_k, mask: (*q_and_k, mask)
    model.ops.attention_mix = lambda q_k_mask, v: kernel(*q_k_mask[:2], v, q_k_mask[2])
    return model


def looped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T`` with the terms added one after the other, as a plain loop in C does."""
    rows, columns = x.flatten(0, -2).numpy(), weight.numpy()
    total = np.zeros((len(rows), len(columns)), rows.dtype)
    for k in range(rows.shape[1]):
        total += rows[:, k, None] * columns[:, k]
    return torch.from_numpy(total).view(*x.shape[:-1], -1)


def looped_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return RMSNorm [..., D], the terms of its mean square added one after the other."""
    sums = np.cumsum(x.numpy() ** 2, axis=-1)[..., -1:]
    mean_square = torch.from_numpy(sums / np.array(x.shape[-1], sums.dtype))
    return weight_D * (x * torch.rsqrt(mean_square + eps))


KERNELS = {
    "flash": fused(SDPBackend.FLASH_ATTENTION),
    "unfused": fused(SDPBackend.MATH),
    "online": online_softmax,
    "forwards": sequential(False),
    "backwards": sequential(True),
}
flash, unfused, online, forwards, backwards = map(with_kernel, KERNELS.values())
loops = with_kernel(KERNELS["forwards"])
loops.ops.linear, loops.ops.rms_norm = looped_linear, looped_rms_norm
