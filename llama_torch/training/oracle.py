"""Compute parts of a step with the NumPy oracle, and bound the model's errors by it."""

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
from reference_np.low_precision import plain_ops, plain_vjps
from reference_np.naming import LM_HEAD
from reference_np.ops import Array
from reference_np.optim import Hyperparameters
from reference_np.tolerances import (
    FLOOR_ROUNDINGS,
    LAMBDA,
    UNIT_ROUNDOFF,
    Errors,
    composed_bound,
    errors,
)

from ..common.errors import InputError
from ..model.config import ModelConfig
from .batch import Batch

# Rows and leading positions that count in a step's first and second micro-batch: few, since the
# oracle runs on the host, and not as many in both, since their gradients make one mean.
PARTS = ((2, 64), (1, 32))

# How often plain arithmetic is tried where the first try says that the model errs too much: how
# far a rounding is carried is a matter of luck.
TRIES = 4


class Observed(NamedTuple):
    """What a model computed, on the CPU."""

    logits: Sequence[Tensor]  # [rows, positions, V] of each micro-batch, as in PARTS
    loss: float
    grads: Mapping[str, Tensor]  # by parameter name


class BoundedError(NamedTuple):
    """The error of one quantity and its bound; of several kinds of error, the nearest to it."""

    quantity: str  # logits, loss or gradients
    error: float
    bound: float
    parameter: str = ""  # whose gradient it is

    @property
    def share(self) -> float:
        """The error as a share of its bound; infinite where it is not finite."""
        return self.error / self.bound if math.isfinite(self.error) else math.inf

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.share <= 1


def bound_errors(
    config: ModelConfig,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    observed: Observed,
    precision: str,
    z_loss: float,
) -> list[BoundedError]:
    """Return the error and bound of the logits, the loss and every parameter's gradient.

    ``params`` and the gradients are whole; ``precision`` is that of matrix products. The bounds
    are tier 3 of reference_np.tolerances: beside plain arithmetic in the same precision, both
    measured against float64. Raises InputError where plain arithmetic overflows.
    """
    parts = [_cut(batch, *part) for batch, part in zip(batches, PARTS, strict=False)]

    def compute(dtype: torch.dtype, precision: str, moved: int = 0) -> _Computed:
        weights = _Weights(params, dtype, moved)
        with np.errstate(all="ignore"):  # what overflows is refused below
            found = _compute(oracle_config(config), weights, parts, z_loss, precision)
        values = (found.logits, np.array(found.loss), *found.grads.values())
        if not all(np.isfinite(value).all() for value in values):
            raise InputError(
                "--verify-every: with these weights the oracle overflows too; lower --lr (the "
                "last checkpoint stands)"
            )
        return found

    exact, plain = compute(torch.float64, "float64"), [compute(torch.float32, precision)]
    found = _measure(observed, exact, plain, precision)
    if not all(measure.holds for measure in found):
        plain += [compute(torch.float32, precision, moved) for moved in range(1, TRIES)]
        found = _measure(observed, exact, plain, precision)
    return found


def worst_of_each(measures: Sequence[BoundedError]) -> dict[str, BoundedError]:
    """Return of each quantity the error that is nearest to its bound, or furthest over it."""
    found: dict[str, BoundedError] = {}
    for measure in measures:
        if measure.quantity not in found or measure.share > found[measure.quantity].share:
            found[measure.quantity] = measure
    return found


class _Weights(Mapping[str, Array]):
    """Parameters as the oracle reads them, one at a time; moved by one rounding if asked."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, moved: int) -> None:
        self.tensors, self.dtype, self.moved = tensors, dtype, moved

    def __getitem__(self, name: str) -> Array:
        tensor = self.tensors[name].detach().cpu()
        if self.moved:  # the same way at every reading
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.moved)
            sign = torch.randint(2, tensor.shape, generator=generator).double() * 2 - 1
            tensor = (tensor * (1 + torch.finfo(tensor.dtype).eps * sign)).to(tensor.dtype)
        array: Array = tensor.to(self.dtype).numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _Computed(NamedTuple):
    """What the oracle computed."""

    logits: Array  # [1, N, V], of all positions that count
    loss: float
    grads: grad.Grads
    # How many times smaller than its terms a sum is: each layer's gradient of scores, which is
    # p_i (d_o . v_i - sum_j p_j d_o . v_j), and the one over the vocabulary that every gradient
    # comes from.
    cancelled: Array
    cancelled_in_head: float


def oracle_config(config: ModelConfig) -> LlamaConfig:
    """Return a model's config as the oracle's."""
    return LlamaConfig(**dataclasses.asdict(config))


def _cut(batch: Batch, rows: int, length: int) -> grad.Batch:
    tokens, targets, positions, mask = (None if x is None else x.cpu().numpy() for x in batch)
    assert tokens is not None
    assert targets is not None
    return grad.Batch(
        tokens[:rows, :length],
        targets[:rows, :length],
        None if positions is None else positions[:rows, :length],
        None if mask is None else mask[:rows, :length, :length],
    )


def _compute(
    config: LlamaConfig,
    params: _Weights,
    batches: Sequence[grad.Batch],
    z_loss: float,
    precision: str,
) -> _Computed:
    """Take the oracle through the batches: its own arithmetic, or that of a lower precision."""
    is_own = precision in ("float64", "float32")
    forward_ops = SimpleNamespace(**vars(ops if is_own else plain_ops(precision)))
    # The mean over the targets is taken in float64.
    forward_ops.cross_entropy_sum = lambda *given: np.float64(ops.cross_entropy_sum(*given))
    head = partial(ops.read, params, LM_HEAD, config)
    recorder = _Recorder(grad.REFERENCE if is_own else plain_vjps(precision), head)
    hyper = Hyperparameters(z_loss=z_loss)
    loss, grads = optim.accumulate(params, batches, config, hyper, recorder.vjps, forward_ops)
    logits = np.concatenate([x.reshape(1, -1, config.vocab_size) for x in recorder.logits], axis=1)
    by_layer = recorder.softmax_sizes(len(batches), config.n_layers)
    in_head = float(_cancelled(np.array(recorder.head_sizes)))
    return _Computed(logits, loss, grads, _cancelled(by_layer), in_head)


class _Recorder:
    """Backward operations that record the logits, and the sizes of sums and of their terms."""

    def __init__(self, vjps: SimpleNamespace, head: Callable[[], Array]) -> None:
        self.real, self.head = vjps, head  # [V, D], read when it is used
        self.logits: list[Array] = []
        self.mix_sizes: list[float] = []
        self.score_sizes: list[float] = []
        self.head_sizes: list[tuple[float, float]] = []
        self.vjps = SimpleNamespace(**vars(vjps))
        self.vjps.attention_mix_vjp = self.attention_mix_vjp
        self.vjps.masked_softmax_vjp = self.masked_softmax_vjp
        self.vjps.cross_entropy_vjp = self.cross_entropy_vjp

    def attention_mix_vjp(self, weights: Array, v_BNSK: Array, d_out: Array) -> tuple[Array, Array]:
        """Record the size of the terms of the scores' gradient."""
        size = grad.attention_mix_vjp(weights, np.abs(v_BNSK), np.abs(d_out))[0] * weights
        self.mix_sizes.append(_norm(size + weights * size.sum(axis=-1, keepdims=True)))
        found: tuple[Array, Array] = self.real.attention_mix_vjp(weights, v_BNSK, d_out)
        return found

    def masked_softmax_vjp(self, weights: Array, d_out: Array) -> Array:
        """Record the size of the scores' gradient."""
        d_scores: Array = self.real.masked_softmax_vjp(weights, d_out)
        self.score_sizes.append(_norm(d_scores))
        return d_scores

    def cross_entropy_vjp(
        self, logits_BTV: Array, targets_BT: Array, n_valid: int, z_loss: float
    ) -> Array:
        """Record the logits, and the sizes of the head's product in the backward pass."""
        d_logits: Array = self.real.cross_entropy_vjp(logits_BTV, targets_BT, n_valid, z_loss)
        self.logits.append(logits_BTV)
        self.head_sizes.append(_head_sizes(d_logits, self.head()))
        return d_logits

    def softmax_sizes(self, n_batches: int, n_layers: int) -> Array:
        """Return the sizes of terms and sums of the scores' gradients: [batch, layer, 2]."""
        # The backward pass begins at the last layer.
        sizes = np.array([*zip(self.mix_sizes, self.score_sizes, strict=True)])
        return sizes.reshape(n_batches, n_layers, 2)[:, ::-1]


def _head_sizes(d_logits_BTV: Array, head_VD: Array) -> tuple[float, float]:
    """Return the norms of a product's terms and of the product; in float32, which is enough."""
    left, right = d_logits_BTV.astype(np.float32), head_VD.astype(np.float32)
    product = left @ right
    return _norm(np.abs(left) @ np.abs(right)), _norm(product)


def _cancelled(sizes: Array) -> Array:
    """Return, from norms [batches, ..., 2] of terms and sums, their ratio over all batches."""
    terms, left = np.moveaxis(np.sqrt(np.sum(sizes**2, axis=0)), -1, 0)
    return np.divide(terms, left, out=np.full_like(terms, math.inf), where=left > 0)


def _measure(
    observed: Observed, exact: _Computed, plain: Sequence[_Computed], precision: str
) -> list[BoundedError]:
    """Judge the logits by every kind of error, loss and gradients by their average alone."""
    unit = "float16" if precision == "tf32" else precision  # tf32 keeps as many bits
    logits = [x.float().numpy().reshape(1, -1, x.shape[-1]) for x in observed.logits]
    error = errors(np.concatenate(logits, axis=1), exact.logits)
    tries = [errors(p.logits, exact.logits) for p in plain]
    bound = composed_bound(Errors(*map(max, zip(*tries, strict=True))), unit)
    shares = error.shares(bound)
    kind = shares.index(max(shares))
    found = [BoundedError("logits", error[kind], bound[kind])]

    losses = [observed.loss, exact.loss, *(p.loss for p in plain)]
    found.append(BoundedError("loss", *_average([*map(np.array, losses)], unit)))
    # Tier 2, for the sum over the vocabulary: NumPy's own order errs far less than others may.
    summed = LAMBDA * math.sqrt(exact.logits.shape[-1]) * UNIT_ROUNDOFF["float32"]
    for name, right in exact.grads.items():
        if not right.any():  # a softmax over one key teaches nothing
            continue
        more = summed * exact.cancelled_in_head
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            in_softmax = float(exact.cancelled[int(name.split(".")[2])])
            more += FLOOR_ROUNDINGS * UNIT_ROUNDOFF[unit] * in_softmax
        mine = observed.grads.get(name, torch.tensor(math.nan))  # none at all is infinitely wrong
        grads = [mine.float().numpy(), right, *(p.grads[name] for p in plain)]
        found.append(BoundedError("gradients", *_average(grads, unit, more), name))
    return found


def _average(values: Sequence[Array], unit: str, more: float = 0.0) -> tuple[float, float]:
    """Return the first value's relative error against the second, and its bound from the rest.

    ``more`` is what the bound inherits from sums whose terms cancel: their errors are roundings
    of the terms (tier 2), and a baseline shows those by luck alone.
    """
    actual, exact, *plain = values
    worst = max(_relative(value, exact) for value in plain)
    bound = composed_bound(Errors(worst, worst, worst), unit).rms + more
    return _relative(actual, exact), bound


def _relative(actual: Array, exact: Array) -> float:
    """Return the error's root mean square over the value's; infinite where it is not finite."""
    if actual.shape != exact.shape:
        return math.inf
    with np.errstate(all="ignore"):
        error, size = _norm(actual - exact), _norm(exact)
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def _norm(x: Array) -> float:
    flat = np.asarray(x, np.float64).ravel()
    return math.sqrt(float(flat @ flat))
