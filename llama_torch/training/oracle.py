"""Compute parts of a training step with the NumPy oracle, and how far their sums cancel.

Axes: B batch, T position, N key/value head, S key position, K head_dim, V vocabulary, D dim.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference_np import grad, ops, optim
from reference_np.config import LlamaConfig
from reference_np.low_precision import rounded_ops, rounded_vjps
from reference_np.naming import LM_HEAD
from reference_np.ops import Array

from ..model.config import ModelConfig
from .batch import Batch

# Rows and leading positions verified of a step's first and second micro-batch: few, since the
# oracle runs on the host; different numbers, since their gradients enter one mean.
PARTS = ((2, 64), (1, 32))


class OracleWeights(Mapping[str, Array]):
    """Parameters as NumPy arrays, converted one at a time; ``perturbation`` seeds random roundings.

    With a ``perturbation`` above 0 every weight is changed by one unit of rounding, up or down.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, perturbation: int
    ) -> None:
        self.tensors, self.dtype, self.perturbation = tensors, dtype, perturbation

    def __getitem__(self, name: str) -> Array:
        tensor = self.tensors[name].detach().cpu()
        if self.perturbation:  # equal at every reading
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.perturbation)
            sign = torch.randint(2, tensor.shape, generator=generator).double() * 2 - 1
            tensor = (tensor * (1 + torch.finfo(tensor.dtype).eps * sign)).to(tensor.dtype)
        array: Array = tensor.to(self.dtype).numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class OracleResult(NamedTuple):
    """Logits, loss and gradients of the oracle."""

    logits: Array  # [1, positions, V], of all verified positions
    loss: float
    grads: grad.Grads
    # Norm of the terms over the norm of their sum, of each layer's gradient of the scores,
    # p_i (d_o . v_i - sum_j p_j d_o . v_j), and of the sum over the vocabulary that begins the
    # backward pass.
    softmax_cancellation: Array
    head_cancellation: float


def oracle_config(config: ModelConfig) -> LlamaConfig:
    """Return the oracle's config of a model's."""
    return LlamaConfig(**dataclasses.asdict(config))


def crop(batch: Batch, rows: int, length: int) -> grad.Batch:
    """Return the first ``rows`` and positions of a micro-batch as NumPy arrays [rows, length]."""
    given = *batch[:3], batch.dense_mask
    tokens, targets, positions, mask = (None if x is None else x.cpu().numpy() for x in given)
    assert tokens is not None
    assert targets is not None
    return grad.Batch(
        tokens[:rows, :length],
        targets[:rows, :length],
        None if positions is None else positions[:rows, :length],
        None if mask is None else mask[:rows, :length, :length],
    )


def compute(
    config: LlamaConfig,
    params: OracleWeights,
    batches: Sequence[grad.Batch],
    z_loss: float,
    precision: str,
) -> OracleResult:
    """Run the oracle forward and backward over the micro-batches, in ``precision``.

    float64 and float32 are NumPy's own arithmetic; a lower precision is simulated.
    """
    is_own = precision in ("float64", "float32")
    forward_ops = SimpleNamespace(**vars(ops if is_own else rounded_ops(precision)))
    # The mean over the targets is taken in float64.
    forward_ops.cross_entropy_sum = lambda *given: np.float64(ops.cross_entropy_sum(*given))
    head = partial(ops.read, params, LM_HEAD, config)
    recorder = _Recorder(grad.REFERENCE_VJPS if is_own else rounded_vjps(precision), head)
    loss, grads = optim.accumulate(params, batches, config, z_loss, recorder.vjps, forward_ops)
    logits = np.concatenate([x.reshape(1, -1, config.vocab_size) for x in recorder.logits], axis=1)
    by_layer = recorder.softmax_norms(len(batches), config.n_layers)
    in_head = float(_cancellation(np.array(recorder.head_norms)))
    return OracleResult(logits, loss, grads, _cancellation(by_layer), in_head)


class _Recorder:
    """Backward operations that record the logits, and the norms of sums and of their terms."""

    def __init__(self, vjps: SimpleNamespace, head: Callable[[], Array]) -> None:
        self.real, self.head = vjps, head  # [V, D], read when it is used
        self.logits: list[Array] = []
        self.term_norms: list[float] = []
        self.score_norms: list[float] = []
        self.head_norms: list[tuple[float, float]] = []
        self.vjps = SimpleNamespace(**vars(vjps))
        self.vjps.attention_mix_vjp = self.attention_mix_vjp
        self.vjps.masked_softmax_vjp = self.masked_softmax_vjp
        self.vjps.cross_entropy_vjp = self.cross_entropy_vjp

    def attention_mix_vjp(self, weights: Array, v_BNSK: Array, d_out: Array) -> tuple[Array, Array]:
        """Return the operation's result; record the norm of the terms of the scores' gradient."""
        size = grad.attention_mix_vjp(weights, np.abs(v_BNSK), np.abs(d_out))[0] * weights
        self.term_norms.append(norm(size + weights * size.sum(axis=-1, keepdims=True)))
        found: tuple[Array, Array] = self.real.attention_mix_vjp(weights, v_BNSK, d_out)
        return found

    def masked_softmax_vjp(self, weights: Array, d_out: Array) -> Array:
        """Return the operation's result; record the norm of the scores' gradient."""
        d_scores: Array = self.real.masked_softmax_vjp(weights, d_out)
        self.score_norms.append(norm(d_scores))
        return d_scores

    def cross_entropy_vjp(
        self, logits_BTV: Array, targets_BT: Array, n_valid: int, z_loss: float
    ) -> Array:
        """Return the operation's result; record logits and the head product's norms."""
        d_logits: Array = self.real.cross_entropy_vjp(logits_BTV, targets_BT, n_valid, z_loss)
        self.logits.append(logits_BTV)
        self.head_norms.append(_head_product_norms(d_logits, self.head()))
        return d_logits

    def softmax_norms(self, n_batches: int, n_layers: int) -> Array:
        """Return the norms of terms and sums of the scores' gradients, [batch, layer, 2]."""
        # The backward pass begins at the last layer.
        sizes = np.array([*zip(self.term_norms, self.score_norms, strict=True)])
        return sizes.reshape(n_batches, n_layers, 2)[:, ::-1]


def _head_product_norms(d_logits_BTV: Array, head_VD: Array) -> tuple[float, float]:
    """Return the norms of the terms of d_logits [B, T, V] @ head [V, D], and of the product."""
    left, right = d_logits_BTV.astype(np.float32), head_VD.astype(np.float32)
    product = left @ right
    return norm(np.abs(left) @ np.abs(right)), norm(product)


def _cancellation(sizes: Array) -> Array:
    """Return the ratio [...] of term norm to sum norm over batches, from norms [batch, ..., 2]."""
    terms, left = np.moveaxis(np.sqrt(np.sum(sizes**2, axis=0)), -1, 0)
    return np.divide(terms, left, out=np.full_like(terms, math.inf), where=left > 0)


def norm(x: Array) -> float:
    """Return the 2-norm of all elements, in float64."""
    flat = np.asarray(x, np.float64).ravel()
    return math.sqrt(float(flat @ flat))
