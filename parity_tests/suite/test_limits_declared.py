"""Declared limits: every example of a backend is drawn inside them."""

import numpy as np
import pytest
from hypothesis import find, settings
from hypothesis.errors import NoSuchExample

from reference_np.config import InputError
from reference_np.limits import LEAST_CONTEXT, Limits, real_tokens

from ..conformance.drawn import SEARCH
from ..conformance.strategies import cases_for, chunk_sizes, padded, unmasked_cases_for
from ..conformance.training_cases import training_cases_for

DTYPES = ("float64", "float32")


def highest(case) -> int:
    longest = case.tokens.shape[1] - 1
    return longest if case.positions is None else int(case.positions.max())


def is_shifted(case) -> bool:
    positions = case.positions
    return positions is None or bool(
        (np.diff(positions, axis=1) == 1).all() and (positions == positions[:1]).all()
    )


def sees_later_keys(mask) -> bool:
    return mask is not None and bool(np.triu(mask, 1).any())


# By limit, whether a case lies outside.
OUTSIDE = {
    "head_dim": lambda c: c.config.dim != c.config.head_dim * c.config.n_heads,
    "masks": lambda c: c.mask is not None,
    "later keys": lambda c: sees_later_keys(c.mask),
    "positions": lambda c: c.positions is not None,
    "shifted": lambda c: not is_shifted(c),
    "rope_types": lambda c: c.config.rope_type == "default",
    "tied": lambda c: c.config.tie_embeddings,
    "context": lambda c: highest(c) > 63 or c.config.max_seq_len != 64,
    "batch": lambda c: len(c.tokens) > 1,
    "float32_epsilon": lambda c: float(np.float32(c.config.norm_eps)) != c.config.norm_eps,
}
NARROW = Limits(
    head_dim="dim / n_heads",
    masks="causal",
    positions="consecutive",
    rope_types=("linear", "llama3"),
    tied=(False,),
    context=64,
    batch=1,
    float32_epsilon=True,
)
HALFWAY = Limits(masks="no later keys", positions="shifted", context=64)
FEW = settings(SEARCH, max_examples=60)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("limits", "names"),
    [
        (NARROW, set(OUTSIDE)),
        (HALFWAY, {"later keys", "shifted", "context"}),
        (Limits(masks="padding"), {"masks"}),
    ],
    ids=["narrow", "halfway", "padding"],
)
def test_no_case_lies_outside_a_limit(limits: Limits, names: set, dtype: str) -> None:
    def outside(case) -> bool:
        return any(OUTSIDE[name](case) for name in names)

    with pytest.raises(NoSuchExample):
        find(cases_for(dtype, limits), outside, settings=FEW)


@pytest.mark.parametrize("name", OUTSIDE)
def test_without_limits_some_cases_lie_outside(name: str) -> None:
    find(cases_for("float64"), OUTSIDE[name], settings=SEARCH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_training_case_lies_outside(dtype: str) -> None:
    limits = Limits(
        head_dim="dim / n_heads", masks="causal", positions="consecutive", batch=1, context=16
    )

    def outside(case) -> bool:
        heads = case.config.dim != case.config.head_dim * case.config.n_heads
        return heads or any(
            len(b.tokens) > 1 or b.positions is not None or b.mask is not None for b in case.batches
        )

    with pytest.raises(NoSuchExample):
        find(training_cases_for(dtype, limits=limits), outside, settings=FEW)
    find(training_cases_for(dtype), outside, settings=SEARCH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [Limits(), Limits(float32_epsilon=True)])
def test_epsilon_is_varied(dtype: str, limits: Limits) -> None:
    for is_wanted in (lambda eps: eps > 5e-4, lambda eps: eps < 5e-6):
        find(
            unmasked_cases_for(dtype, limits),
            lambda c, wanted=is_wanted: wanted(c.config.norm_eps),
            settings=SEARCH,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_stay_below_max_seq_len(dtype: str) -> None:
    with pytest.raises(NoSuchExample):
        find(cases_for(dtype), lambda c: highest(c) >= c.config.max_seq_len, settings=FEW)
    with pytest.raises(NoSuchExample):
        find(training_cases_for(dtype), is_beyond_context, settings=FEW)


def is_beyond_context(case) -> bool:
    return any(
        b.positions is not None and b.positions.max() >= case.config.max_seq_len
        for b in case.batches
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_calls_are_at_the_default_positions(dtype: str) -> None:
    with pytest.raises(NoSuchExample):
        find(
            unmasked_cases_for(dtype),
            lambda c: c.positions is not None or c.mask is not None,
            settings=FEW,
        )


def test_one_token_is_appended_after_the_prompt() -> None:
    limits = Limits(appended="one token")
    with pytest.raises(NoSuchExample):
        find(chunk_sizes(6, limits), lambda sizes: max(sizes[1:], default=1) > 1, settings=FEW)
    find(chunk_sizes(6, limits), lambda sizes: sizes == [3, 1, 1, 1], settings=SEARCH)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"masks": "square"}, "masks"),
        ({"positions": None}, "positions"),
        ({"cache": "yes"}, "cache"),
        ({"appended": 1}, "appended"),
        ({"head_dim": 64}, "head_dim"),
        ({"rope_types": ()}, "rope_types"),
        ({"rope_types": "default"}, "rope_types"),
        ({"rope_types": ("yarn",)}, "rope_types"),
        ({"tied": True}, "tied"),
        ({"float32_angles": True}, "float32_angles"),
        ({"context": LEAST_CONTEXT - 1}, "context"),
        ({"context": True}, "context"),
        ({"batch": 0}, "batch"),
    ],
)
def test_a_bad_limit_is_named(given: dict, named: str) -> None:
    with pytest.raises(InputError, match=f"limits: {named} must be"):
        Limits(**given)


@pytest.mark.parametrize("left", [True, False])
def test_real_tokens_are_those_of_padded_rows(left: bool) -> None:
    _, mask, real = padded([2, 5, 1, 3], left)
    assert np.array_equal(real_tokens(mask), real)
    # A new token after the padded prompt: [B, 1, S].
    new = np.concatenate([real, np.ones((4, 1), bool)], axis=1)
    assert np.array_equal(real_tokens(new[:, None]), new)


def test_one_padding_token_on_the_right_counts_as_real() -> None:
    _, mask, _ = padded([2, 3], left=False)
    assert real_tokens(mask).all()


def test_limits_declare_what_differs_from_none() -> None:
    assert Limits().declared() == {}
    assert Limits(batch=1, masks="causal").declared() == {"masks": "causal", "batch": 1}
