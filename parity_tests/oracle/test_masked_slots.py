"""Fine-tuning's operations, however the answers lie in a batch and whatever lies beside them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np.fine_tuning_mutants import FINE_TUNING
from reference_np.ops import Array

from ..support.fine_tuning import agree
from ..support.fine_tuning_cases import (
    CASES,
    FILLERS,
    LAYOUTS,
    REFERENCE,
    Answers,
    answers,
    answers_of,
    as_tuple,
)

pytestmark = pytest.mark.numeric


def put_together(given: Answers, outputs: list[Array]) -> Array:
    """Return what a batch's output must be, of the outputs of each row alone."""
    if outputs[0].ndim == 0:
        return np.sum(outputs, axis=0)
    if outputs[0].ndim == 1:
        return np.concatenate(outputs)
    whole = np.zeros((*given.mask.shape, *outputs[0].shape[2:]))
    whole[given.mask] = np.concatenate([output[0] for output in outputs])
    return whole


def differs(name: str, given: Answers, filler: float, operations: Any = REFERENCE) -> bool:
    """Return whether an operation on a batch is not what it is on each row alone."""
    count = 11  # of a step that this batch may be a part of
    with np.errstate(all="ignore" if operations is not REFERENCE else None):
        whole = as_tuple(CASES[name](operations, given.batch(filler), count))
        alone = [as_tuple(CASES[name](operations, row, count)) for row in given.alone()]
    together = [put_together(given, [row[i] for row in alone]) for i in range(len(whole))]
    return not all(agree(one, other) for one, other in zip(whole, together, strict=True))


@pytest.mark.parametrize("name", CASES)
@given(given=answers(), filler=st.sampled_from(FILLERS))
def test_each_row_has_its_own_values_wherever_it_lies_and_whatever_is_beside_it(
    name: str, given: Answers, filler: float
) -> None:
    assert not differs(name, given, filler)


# The known bugs that this property sees, without a right value to compare with.
SEEN = (
    *("token_loss_of_own_mean", "token_loss_times_mask", "first_tokens_gradient"),
    *("no_gradient_with_ignored", "score_counted_from_left", "score_at_last_slot"),
    *("entropy_of_padding", "kl_of_padding", "score_after_the_end", "advantage_from_padding"),
    *("advantage_through_tool_tokens", "policy_loss_of_own_mean", "row_mean_over_padding"),
    "policy_loss_times_mask",
)


@pytest.mark.parametrize("name", SEEN)
def test_a_known_bug_is_seen_by_it(name: str) -> None:
    [bug] = [mutant for mutant in FINE_TUNING if mutant.name == name]
    batches = [answers_of([3, 1, 4], layout, seed) for seed, layout in enumerate(LAYOUTS)]
    cases = [case for case in CASES if case.split()[0] == bug.operation]
    assert any(
        differs(case, batch, filler, bug.apply(REFERENCE))
        for case in cases
        for batch in batches
        for filler in FILLERS
    )


ADDITIVE = [name for name in CASES if "loss" in name and "vjp" not in name]


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("score_at",)])
def test_a_row_without_a_real_token_adds_nothing(name: str) -> None:
    with_empty = answers_of([2, 0, 3], "left", 1)
    without = Answers(
        [row for row in with_empty.rows if len(row["values"])], with_empty.mask[[0, 2]]
    )
    found = as_tuple(CASES[name](REFERENCE, with_empty.batch(np.nan), 7))
    batch = without.batch(np.nan)._replace(scores=with_empty.scores[[0, 2]])
    for one, expected in zip(found, as_tuple(CASES[name](REFERENCE, batch, 7)), strict=True):
        if name in ADDITIVE:
            assert agree(one, expected)
        else:
            assert not np.any(one[1])
            assert agree(one[[0, 2]], expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arguments_are_left_alone_and_their_precision_is_kept(name: str, dtype: type) -> None:
    batch = answers_of([2, 4], "right", 3).batch(np.nan)
    arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in batch.arrays.items()}
    for array in (*arrays.values(), batch.mask):
        array.flags.writeable = False
    batch = batch._replace(arrays=arrays, scores=batch.scores.astype(dtype))
    for found in as_tuple(CASES[name](REFERENCE, batch, 5)):
        assert found.ndim == 0 or found.dtype == dtype
