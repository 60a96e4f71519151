"""A training run held to the NumPy oracle as it goes: ``--verify-every``.

The one module of this package that imports the oracle; the trainer imports it when asked to.

What is verified is what trains. The live model, compiled or not, takes whole micro-batches of the
step just done, in which all but a few targets are ignored. Attention is causal, so that what is
left (the loss, its gradients, the logits of the positions that count) depends on a few short rows
alone, and those are all that the oracle computes. What leaks in from elsewhere shows.

What goes wrong in long sums alone does not show there. The embedding's gradient adds up as many
terms as a token occurs, which may be half of a micro-batch: with every target it is held to the
sum of the terms that it was made of.

``observe`` runs a model; ``judge`` compares what a model computed, however it is spread over
devices, given whole tensors on the CPU.
"""

import dataclasses
import math
import os
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference_np import grad, ops
from reference_np.config import LlamaConfig
from reference_np.grad import Batch, Grads
from reference_np.low_precision import plain_ops, plain_vjps
from reference_np.model import Ops, forward
from reference_np.naming import EMBED, LM_HEAD, parameter_shapes
from reference_np.ops import Array
from reference_np.tolerances import (
    FLOOR_ROUNDINGS,
    LAMBDA,
    UNIT_ROUNDOFF,
    Errors,
    composed_bound,
    errors,
)

from . import step
from .checkpoint import MODEL_FILE
from .config import InputError, ModelConfig
from .loss import IGNORE, count_valid
from .model import Llama
from .verify_sums import embedding_error, gradients_aside

# Rows and leading positions that count in a step's first and second micro-batch: few, since the
# oracle runs on the host, and not as many in both, since their gradients make one mean.
PARTS = ((2, 64), (1, 32))
# Of host memory for each parameter: gradients in float64 and twice in float32, and one matrix.
BYTES_PER_PARAMETER = 18
# How often plain arithmetic is tried where the first try says that the model errs too much: how
# far a rounding is carried is a matter of luck.
TRIES = 4


class Observed(NamedTuple):
    """What a model computed, on the CPU."""

    logits: Sequence[Tensor]  # [rows, positions, V] of each micro-batch, as in PARTS
    loss: float
    grads: Mapping[str, Tensor]  # by parameter name


class Measure(NamedTuple):
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


def require_memory(config: ModelConfig) -> None:
    """Raise InputError where this machine cannot hold what a check needs."""
    shapes = parameter_shapes(_oracles(config))
    needed = BYTES_PER_PARAMETER * sum(map(math.prod, shapes.values()))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"--verify-every needs some {needed / 2**30:.0f} GiB of host memory for a model of "
            f"this size, and this machine has {there / 2**30:.0f}; leave it out"
        )


def check(model: Llama, batches: Sequence[step.Batch], z_loss: float) -> list[Measure]:
    """Compare a model with the oracle on part of a step's micro-batches; nothing is changed."""
    picked = pick(batches)
    weight = model.head_weight
    found = judge(
        model.config,
        dict(model.named_parameters()),
        picked,
        observe(model, picked, z_loss),
        arithmetic(weight.device, weight.dtype),
        z_loss,
    )
    error, bound = embedding_error(model, batches[0], z_loss, LAMBDA)
    return [*found, Measure("gradients", error, bound, EMBED)]


def pick(batches: Sequence[step.Batch]) -> list[step.Batch]:
    """Return a step's first micro-batches, with no targets but those that PARTS keeps."""
    picked = []
    for batch, (rows, length) in zip(batches, PARTS, strict=False):
        targets = torch.full_like(batch.targets, IGNORE)
        targets[:rows, :length] = batch.targets[:rows, :length]
        if not count_valid(targets):  # any others will do
            targets[:rows, :length] = batch.tokens[:rows, :length]
        picked.append(batch._replace(targets=targets))
    return picked


def observe(model: Llama, batches: Sequence[step.Batch], z_loss: float) -> Observed:
    """Run what a training step runs, up to its gradients; nothing of the model is changed."""
    hidden: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda *call: hidden.append(call[2][0].detach()))
    try:
        with gradients_aside(model):
            loss, grads = step.accumulate(model, batches, z_loss)
            named = {name: grads[p].cpu() for name, p in model.named_parameters() if p in grads}
            with torch.no_grad():
                parts = zip(hidden, PARTS, strict=False)
                logits = [model.head(x_BTD[:rows, :n]).cpu() for x_BTD, (rows, n) in parts]
    finally:
        hook.remove()
    return Observed(logits, loss.item(), named)


def arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """Return the precision of matrix products: float32 ones may be allowed to be tf32 or less.

    Asked of a product of many rows. Some processors multiply a few rows more precisely, which
    the wider bound allows.
    """
    if dtype == torch.float32:
        one = torch.eye(256, device=device)
        for name, small in {"float32": 2.0**-20, "tf32": 2.0**-9}.items():
            matrix = torch.full_like(one, 1 + small)
            if torch.equal(matrix @ one, matrix):
                return name
    return "bfloat16"


def judge(
    config: ModelConfig,
    params: Mapping[str, Tensor],
    batches: Sequence[step.Batch],
    observed: Observed,
    precision: str,
    z_loss: float,
) -> list[Measure]:
    """Return the error and bound of the logits, the loss and every parameter's gradient.

    ``params`` and the gradients are whole; ``precision`` is that of matrix products. The bounds
    are tier 3 of reference_np.tolerances: beside plain arithmetic in the same precision, both
    measured against float64. Raises InputError where plain arithmetic overflows.
    """
    parts = [_cut(batch, *part) for batch, part in zip(batches, PARTS, strict=False)]

    def compute(dtype: torch.dtype, precision: str, moved: int = 0) -> _Computed:
        weights = _Weights(params, dtype, moved)
        with np.errstate(all="ignore"):  # what overflows is refused below
            found = _compute(_oracles(config), weights, parts, z_loss, precision)
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


def nearest(measures: Sequence[Measure]) -> dict[str, Measure]:
    """Return of each quantity the measure that is nearest to its bound, or furthest over it."""
    found: dict[str, Measure] = {}
    for measure in measures:
        if measure.quantity not in found or measure.share > found[measure.quantity].share:
            found[measure.quantity] = measure
    return found


def complaint(measures: Sequence[Measure], out: Path, done: int) -> str:
    """Say on one line what does not hold after ``done`` steps, and where to look."""
    broken = [measure for measure in measures if not measure.holds]
    parts = []
    for quantity, worst in nearest(broken).items():
        n = sum(measure.quantity == quantity for measure in broken)
        name = f"{n} gradients, worst of {worst.parameter}" if worst.parameter else quantity
        parts.append(f"{name}: error {worst.error:.1e}, bound {worst.bound:.1e}")
    where = "no checkpoint was saved yet"
    if (out / MODEL_FILE).exists():
        flags = "" if any(measure.quantity == "logits" for measure in broken) else " --grads"
        model = shlex.quote(str(out / MODEL_FILE))
        where = f"try the last checkpoint with: python tools/compare.py {model}{flags}"
    return (
        f"step {done}: the model does not compute what the oracle does ({'; '.join(parts)}); "
        f"this step was not saved; {where}"
    )


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
    grads: Grads
    # How many times smaller than its terms a sum is: each layer's gradient of scores, which is
    # p_i (d_o . v_i - sum_j p_j d_o . v_j), and the one over the vocabulary that every gradient
    # comes from.
    cancelled: Array
    cancelled_in_head: float


def _oracles(config: ModelConfig) -> LlamaConfig:
    return LlamaConfig(**dataclasses.asdict(config))


def _cut(batch: step.Batch, rows: int, length: int) -> Batch:
    tokens, targets, positions, mask = (None if x is None else x.cpu().numpy() for x in batch)
    assert tokens is not None
    assert targets is not None
    return Batch(
        tokens[:rows, :length],
        targets[:rows, :length],
        None if positions is None else positions[:rows, :length],
        None if mask is None else mask[:rows, :length, :length],
    )


def _compute(
    config: LlamaConfig, params: _Weights, batches: Sequence[Batch], z_loss: float, precision: str
) -> _Computed:
    """Take the oracle through the batches: its own arithmetic, or that of a lower precision."""
    is_own = precision in ("float64", "float32")
    forward_ops: Ops = ops if is_own else plain_ops(precision)
    vjps = SimpleNamespace(**vars(grad.REFERENCE if is_own else plain_vjps(precision)))
    mix_vjp, softmax_vjp = vjps.attention_mix_vjp, vjps.masked_softmax_vjp
    terms, left, head_sizes = [], [], []

    def mix(weights: Array, v_BNSK: Array, d_out: Array) -> tuple[Array, Array]:
        size = grad.attention_mix_vjp(weights, np.abs(v_BNSK), np.abs(d_out))[0] * weights
        terms.append(_norm(size + weights * size.sum(axis=-1, keepdims=True)))
        found: tuple[Array, Array] = mix_vjp(weights, v_BNSK, d_out)
        return found

    def softmax(weights: Array, d_out: Array) -> Array:
        d_scores: Array = softmax_vjp(weights, d_out)
        left.append(_norm(d_scores))
        return d_scores

    vjps.attention_mix_vjp, vjps.masked_softmax_vjp = mix, softmax
    n_valid = sum(int(np.sum(batch.targets != IGNORE)) for batch in batches)
    logits, loss, total = [], 0.0, Grads()
    for batch in batches:
        trace: dict[str, Array] = {}
        logits_BTV, _ = forward(
            params,
            batch.tokens,
            config,
            positions=batch.positions,
            mask=batch.mask,
            trace=trace.__setitem__,
            ops=forward_ops,
        )
        loss += float(ops.cross_entropy_sum(logits_BTV, batch.targets, z_loss)) / n_valid
        d_logits = vjps.cross_entropy_vjp(logits_BTV, batch.targets, n_valid, z_loss)
        head_sizes.append(_head_sizes(d_logits, ops.read(params, LM_HEAD, config)))
        grads = grad.backward(params, batch, trace, d_logits, config, vjps)
        total = {name: total[name] + g if total else g for name, g in grads.items()}
        logits.append(logits_BTV.reshape(1, -1, config.vocab_size))
    # The backward pass begins at the last layer.
    sizes = np.array([*zip(terms, left, strict=True)])
    by_layer = sizes.reshape(len(batches), config.n_layers, 2)[:, ::-1]
    cancelled, in_head = _cancelled(by_layer), float(_cancelled(np.array(head_sizes)))
    return _Computed(np.concatenate(logits, axis=1), loss, total, cancelled, in_head)


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
) -> list[Measure]:
    """Judge the logits by every kind of error, loss and gradients by their average alone."""
    unit = "float16" if precision == "tf32" else precision  # tf32 keeps as many bits
    logits = [x.float().numpy().reshape(1, -1, x.shape[-1]) for x in observed.logits]
    error = errors(np.concatenate(logits, axis=1), exact.logits)
    tries = [errors(p.logits, exact.logits) for p in plain]
    bound = composed_bound(Errors(*map(max, zip(*tries, strict=True))), unit)
    shares = error.shares(bound)
    kind = shares.index(max(shares))
    found = [Measure("logits", error[kind], bound[kind])]

    losses = [observed.loss, exact.loss, *(p.loss for p in plain)]
    found.append(Measure("loss", *_average([*map(np.array, losses)], unit)))
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
        found.append(Measure("gradients", *_average(grads, unit, more), name))
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
