"""Honest float32 kernels, each another way of taking the same sums.

Every kernel of attention maps q [B, H, T, K], k and v [B, H, S, K] and mask [B, T, S] to
[B, H, T, K]; every query may attend to some key.
``parity_tests.planted.honest_kernels:flash`` and so on are whole models, for compare.py's
--against; so is ``loops``, all of whose other sums are taken term by term.
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
    """Return one of torch's own kernels."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, mask[:, None])

    return kernel


def scores_of(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return masked scores [B, H, T, S]."""
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~mask[:, None], -1e30)


def online_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Take blocks of keys, last first, and scale the sums again where the maximum grows."""
    scores, top = scores_of(q, k, mask), torch.full_like(q[..., :1], -1e30)
    total, mixed = torch.zeros_like(top), torch.zeros_like(q)
    for part, values in reversed([*zip(scores.split(16, -1), v.split(16, -2), strict=True)]):
        higher = torch.maximum(top, part.amax(-1, keepdim=True))
        shrink, weights = (top - higher).exp(), (part - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed, top = mixed * shrink + weights @ values, higher
    return mixed / total


def one_by_one(backwards: bool) -> Kernel:
    """Return attention that adds key after key, the simplest and worst order."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = scores_of(q, k, mask)
        weights = (scores - scores.amax(-1, keepdim=True)).exp().numpy()
        terms = weights[..., None] * v.numpy()[:, :, None]
        total, mixed = (x[:, :, :, ::-1] if backwards else x for x in (weights, terms))
        # NumPy's cumulative sum is one by one, and in float32.
        total, mixed = np.cumsum(total, axis=3)[..., -1:], np.cumsum(mixed, axis=3)[..., -1, :]
        return torch.from_numpy(mixed / total)

    return kernel


def planted(kernel: Kernel) -> Planted:
    """Return a model in torch, behind the protocol of backends, with this kernel in it."""
    model = Planted()
    model.ops.attention_scores = lambda q, k: (q, k)
    model.ops.masked_softmax = lambda q_and_k, mask: (*q_and_k, mask)
    model.ops.attention_mix = lambda given, v: kernel(given[0], given[1], v, given[2])
    return model


def looped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Add a product's terms one after the other, as a plain loop in C does."""
    rows, columns = x.flatten(0, -2).numpy(), weight.numpy()
    total = np.zeros((len(rows), len(columns)), rows.dtype)
    for k in range(rows.shape[1]):
        total += rows[:, k, None] * columns[:, k]
    return torch.from_numpy(total).view(*x.shape[:-1], -1)


def looped_mean_square(x: Tensor) -> Tensor:
    """Add a mean's terms one after the other."""
    sums = np.cumsum(x.numpy() ** 2, axis=-1)[..., -1:]
    return torch.from_numpy(sums / np.array(x.shape[-1], sums.dtype))


KERNELS = {
    "flash": fused(SDPBackend.FLASH_ATTENTION),
    "unfused": fused(SDPBackend.MATH),
    "online": online_softmax,
    "forwards": one_by_one(False),
    "backwards": one_by_one(True),
}
flash, unfused, online, forwards, backwards = map(planted, KERNELS.values())
loops = planted(KERNELS["forwards"])
loops.ops.linear, loops.ops.mean_square = looped_linear, looped_mean_square
