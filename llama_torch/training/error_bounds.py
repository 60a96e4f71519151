"""Bound the errors of a training step's logits, loss and gradients by the oracle's.

Axes: V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_common.errors import InputError
from reference_np.ops import Array
from reference_np.tolerances import (
    FLOOR_ROUNDINGS,
    LAMBDA,
    UNIT_ROUNDOFF,
    Errors,
    composed_bound,
    errors,
)

from ..model.config import ModelConfig
from . import oracle
from .batch import Batch
from .oracle import PARTS, OracleResult, OracleWeights, norm

# Number of baselines, all but the first from weights perturbed by one rounding, if the first does
# not cover the model's error: how far a rounding propagates varies from case to case.
TRIES = 4


class Observed(NamedTuple):
    """A model's logits, loss and gradients, on the CPU."""

    logits: Sequence[Tensor]  # [rows, positions, V] of each micro-batch, as in PARTS
    loss: float
    grads: Mapping[str, Tensor]  # by parameter name


class BoundedError(NamedTuple):
    """One quantity's error and bound; of several kinds of error, the one nearest to its bound."""

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

    ``params`` and the gradients are unsharded, by parameter name; ``precision`` is that of matrix
    products. The bounds are tier 3 of reference_np.tolerances: a multiple of the error of NumPy
    baselines in the same precision, where errors are taken against float64. Raises InputError
    where the oracle overflows.
    """
    parts = [oracle.crop(batch, *part) for batch, part in zip(batches, PARTS, strict=False)]

    def compute(dtype: torch.dtype, precision: str, perturbation: int = 0) -> OracleResult:
        weights = OracleWeights(params, dtype, perturbation)
        with np.errstate(all="ignore"):  # an overflow raises InputError below
            result = oracle.compute(oracle.oracle_config(config), weights, parts, z_loss, precision)
        values = (result.logits, np.array(result.loss), *result.grads.values())
        if not all(np.isfinite(value).all() for value in values):
            raise InputError(
                "--verify-every: with these weights the oracle overflows too; lower --lr (the "
                "last checkpoint stands)"
            )
        return result

    exact = compute(torch.float64, "float64")
    baselines = [compute(torch.float32, precision)]
    bounded = _measure(observed, exact, baselines, precision)
    if not all(measure.holds for measure in bounded):
        baselines += [
            compute(torch.float32, precision, perturbation) for perturbation in range(1, TRIES)
        ]
        bounded = _measure(observed, exact, baselines, precision)
    return bounded


def worst_of_each(measures: Sequence[BoundedError]) -> dict[str, BoundedError]:
    """Return the error with the largest share of its bound, by quantity."""
    worst: dict[str, BoundedError] = {}
    for measure in measures:
        if measure.quantity not in worst or measure.share > worst[measure.quantity].share:
            worst[measure.quantity] = measure
    return worst


def _measure(
    observed: Observed, exact: OracleResult, baselines: Sequence[OracleResult], precision: str
) -> list[BoundedError]:
    """Bound every kind of error of the logits, and the relative error of loss and gradients."""
    unit = "float16" if precision == "tf32" else precision  # tf32 keeps as many bits
    logits = [x.float().numpy().reshape(1, -1, x.shape[-1]) for x in observed.logits]
    error = errors(np.concatenate(logits, axis=1), exact.logits)
    tries = [errors(p.logits, exact.logits) for p in baselines]
    bound = composed_bound(Errors(*map(max, zip(*tries, strict=True))), unit)
    shares = error.shares(bound)
    kind = shares.index(max(shares))
    bounded = [BoundedError("logits", error[kind], bound[kind])]

    losses = [observed.loss, exact.loss, *(p.loss for p in baselines)]
    bounded.append(BoundedError("loss", *_relative_error_and_bound([*map(np.array, losses)], unit)))
    # Tier 2, of the sum over the vocabulary: NumPy's pairwise order errs less than others may.
    tier_2 = LAMBDA * math.sqrt(exact.logits.shape[-1]) * UNIT_ROUNDOFF["float32"]
    for name, exact_grad in exact.grads.items():
        if not exact_grad.any():  # the gradient through a softmax over one key is zero
            continue
        inherited = tier_2 * exact.head_cancellation
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            in_softmax = float(exact.softmax_cancellation[int(name.split(".")[2])])
            inherited += FLOOR_ROUNDINGS * UNIT_ROUNDOFF[unit] * in_softmax
        # A missing gradient has an infinite error.
        observed_grad = observed.grads.get(name, torch.tensor(math.nan))
        grads = [observed_grad.float().numpy(), exact_grad, *(p.grads[name] for p in baselines)]
        bounded.append(
            BoundedError("gradients", *_relative_error_and_bound(grads, unit, inherited), name)
        )
    return bounded


def _relative_error_and_bound(
    values: Sequence[Array], unit: str, inherited: float = 0.0
) -> tuple[float, float]:
    """Return the first value's relative error against the second, and its bound from the rest.

    ``inherited`` is the part of the bound due to sums whose terms cancel: their errors are
    roundings of the terms (tier 2), which a baseline may not show.
    """
    actual, exact, *baselines = values
    worst = max(_relative(value, exact) for value in baselines)
    bound = composed_bound(Errors(worst, worst, worst), unit).rms + inherited
    return _relative(actual, exact), bound


def _relative(actual: Array, exact: Array) -> float:
    """Return the error's root mean square over the value's; infinite where it is not finite."""
    if actual.shape != exact.shape:
        return math.inf
    with np.errstate(all="ignore"):
        error, size = norm(actual - exact), norm(exact)
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)
