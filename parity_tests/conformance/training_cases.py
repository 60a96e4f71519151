"""Hypothesis strategies for training steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.limits import UNLIMITED, Limits
from reference_np.ops import IGNORE
from reference_np.optim import Hyperparameters

from .architectures import configs, seeds
from .drawn import Draw, composite, describe_case
from .strategies import (
    FREE_MASKS,
    Array,
    Params,
    random_params,
    reaching,
    wide_cases,
    with_diagonal,
)

# Of the results of ten steps: every step amplifies the rounding of those before it, as AdamW
# divides by sqrt(v) + 1e-5. One rounding of 1e-16 becomes 1e-16 * 1e5 * 10 = 1e-10 at most; a
# gradient is a sum of many, hence the factor of ten beyond that.
STEPS_TOLERANCE = 1e-9


class TrainingCase(NamedTuple):
    """A model and the micro-batches of one optimizer step."""

    config: LlamaConfig
    params: Params  # float64
    batches: list[Batch]
    hyper: Hyperparameters
    numbers: Mapping[str, Any] | None = None  # the labelled draws it was made from

    def __repr__(self) -> str:
        """Return the labelled draws in place of the arrays."""
        return describe_case(self)


def random_batch(rng: np.random.Generator, config: LlamaConfig, custom: bool) -> Batch:
    """Return a random micro-batch with ignored targets; if ``custom``, with positions and mask."""
    shape = (int(rng.integers(1, 4)), int(rng.integers(2, 9)))
    tokens, targets = rng.integers(0, config.vocab_size, (2, *shape))
    targets[rng.random(shape) < rng.choice([0.0, 0.3, 0.8])] = IGNORE
    targets[0, 0] = 0  # at least one valid target
    if not custom:
        return Batch(tokens, targets)
    mask = with_diagonal(rng.random((*shape, shape[1])) < 0.6)
    return Batch(tokens, targets, rng.integers(0, 5000, shape), mask)


def limited(batch: Batch, limits: Limits) -> Batch:
    """Return a micro-batch within limits: without what lies outside."""
    rows, highest = slice(limits.batch), limits.context or 5000
    tokens, targets, positions, mask = (None if x is None else x[rows] for x in batch)
    if positions is not None:
        positions = positions % highest
        shifted = np.broadcast_to(positions[:1, :1] + np.arange(tokens.shape[1]), tokens.shape)
        shifted = np.minimum(shifted, shifted - shifted.max() + highest - 1)
        by_limit = {"any": positions, "shifted": np.array(shifted), "consecutive": None}
        positions = by_limit[limits.positions]
    if mask is not None and limits.masks != "any":
        mask = np.tril(mask) if limits.masks in FREE_MASKS else None
    return Batch(tokens, targets, positions, mask)


@composite
def training_cases(
    draw: Draw, conditioned: bool = False, limits: Limits = UNLIMITED
) -> TrainingCase:
    """Draw a model, micro-batches with and without a mask, and a clipping limit high or low.

    ``conditioned`` keeps training from being chaotic, so that rounding in one step is still
    rounding ten steps later: an RMSNorm over one element is its sign, and a step across zero
    changes every output.
    """
    config = draw(configs(least_width=16 if conditioned else 1, limits=limits))
    rng = np.random.default_rng(draw(seeds, label="batches seed"))
    batches = [
        limited(random_batch(rng, config, custom), limits)
        for custom in draw(st.lists(st.booleans(), min_size=1, max_size=3), label="custom masks")
    ]
    hyper = Hyperparameters(
        lr=draw(st.sampled_from([1e-3 if conditioned else 1e-2, 3e-4]), label="lr"),
        grad_clip=draw(st.sampled_from([0.05, 1e3]), label="grad_clip"),
        z_loss=draw(st.sampled_from([0.0, 1e-2]), label="z_loss"),
        warmup_steps=3,
        steps=12,
    )
    params = random_params(config, draw(seeds, label="weights seed"))
    config = reaching(config, [batch.positions for batch in batches])
    return TrainingCase(config, params, batches, hyper, draw.numbers)


@composite
def wide_training_cases(draw: Draw, limits: Limits = UNLIMITED) -> TrainingCase:
    """Draw a wide model and micro-batches of unequal valid counts, for low precision."""
    case = draw(wide_cases(limits=limits))
    rng = np.random.default_rng(draw(seeds, label="batches seed"))
    first = Batch(case.tokens, np.roll(case.tokens, -1, axis=1), case.positions)
    batches = [first]
    for custom in draw(st.lists(st.booleans(), max_size=2), label="custom masks"):
        batches.append(limited(random_batch(rng, case.config, custom), limits))
    hyper = Hyperparameters(
        lr=1e-3,
        grad_clip=draw(st.sampled_from([1.0, 1e3]), label="grad_clip"),
        z_loss=draw(st.sampled_from([0.0, 1e-2]), label="z_loss"),
        warmup_steps=3,
        steps=12,
    )
    config = reaching(case.config, [batch.positions for batch in batches])
    return TrainingCase(config, case.params, batches, hyper, draw.numbers)


def training_cases_for(
    dtype: str, conditioned: bool = False, limits: Limits = UNLIMITED
) -> st.SearchStrategy[TrainingCase]:
    """Return the strategy of training cases for a precision, float64 or float32."""
    return (
        training_cases(conditioned, limits) if dtype == "float64" else wide_training_cases(limits)
    )


def fixed_training_cases() -> list[TrainingCase]:
    """Return four cases of which at least one shows each training bug."""
    cases = []
    for seed, (tied, clip, z_loss) in enumerate(
        [(False, 1e3, 0.0), (True, 0.05, 1e-2), (True, 1e3, 1e-2), (False, 0.05, 0.0)]
    ):
        rng = np.random.default_rng(seed)
        config = LlamaConfig(12, 2, 6, 2, 6, 20, 17, tie_embeddings=tied)
        batches = [random_batch(rng, config, custom) for custom in (False, True, False)]
        hyper = Hyperparameters(lr=1e-2, grad_clip=clip, z_loss=z_loss, warmup_steps=3, steps=12)
        cases.append(TrainingCase(config, random_params(config, seed), batches, hyper))
    return cases


def max_abs(value: Array | float) -> float:
    """Return the largest absolute value."""
    return float(np.max(np.abs(value), initial=0.0))
