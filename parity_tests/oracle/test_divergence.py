"""Log-probabilities, estimators of the KL divergence and entropy, over the whole vocabulary."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_np import divergence
from reference_np.ops import Array

from ..conformance.architectures import seeds
from ..support.fine_tuning import VOCAB, agree

pytestmark = pytest.mark.numeric


def two_distributions(seed: int) -> tuple[Array, Array]:
    """Return logits [1, 1, V] of a policy and of its reference."""
    first, second = 2 * np.random.default_rng(seed).standard_normal((2, 1, 1, VOCAB))
    return first, second


def every_token(logits: Array, ref_logits: Array) -> tuple[Array, Array, Array]:
    """Return log pi and log pi_0 of every token of the vocabulary [1, V], and a mask of them."""
    rows = (
        np.broadcast_to(logits, (1, VOCAB, VOCAB)),
        np.broadcast_to(ref_logits, (1, VOCAB, VOCAB)),
    )
    log_p, log_ref = (divergence.log_probs(row, np.arange(VOCAB)[None]) for row in rows)
    return log_p, log_ref, np.ones((1, VOCAB), bool)


@given(seed=seeds)
def test_the_mean_of_each_estimator_over_the_vocabulary(seed: int) -> None:
    logits, ref_logits = two_distributions(seed)
    log_p, log_ref, mask = every_token(logits, ref_logits)
    p, q = np.exp(log_p), np.exp(log_ref)
    exact = np.sum(p * np.log(p / q))
    assert agree(divergence.exact_kl(logits, ref_logits, mask[:, :1]), [[exact]])
    assert agree(np.sum(p * divergence.k1(log_p, log_ref, mask)), exact)
    assert agree(np.sum(p * divergence.k3(log_p, log_ref, mask)), exact)
    assert agree(
        np.sum(p * divergence.k2(log_p, log_ref, mask)), np.sum(p * np.log(p / q) ** 2) / 2
    )
    assert (divergence.k3(log_p, log_ref, mask) >= 0).all()


@given(seed=seeds)
def test_the_mean_of_each_estimators_gradient(seed: int) -> None:
    """k2's is the KL's; k1's is zero and k3's is the other direction's, so neither is its loss."""
    logits, ref_logits = two_distributions(seed)
    log_p, log_ref, mask = every_token(logits, ref_logits)
    p, q = np.exp(log_p), np.exp(log_ref)
    each = np.broadcast_to(logits, (1, VOCAB, VOCAB))
    tokens = np.arange(VOCAB)[None]

    def mean_gradient(vjp: Callable[..., Array]) -> Array:
        """Return the gradient with respect to the logits [V] of the mean under pi held fixed."""
        d_log_p = vjp(log_p, log_ref, mask, p)
        return np.asarray(divergence.log_probs_vjp(each, tokens, d_log_p)[0].sum(axis=0))

    one = np.ones((1, 1))
    exact = divergence.exact_kl_vjp(logits, ref_logits, one > 0, one)[0, 0]
    assert agree(mean_gradient(divergence.k2_vjp), exact)
    assert agree(mean_gradient(divergence.k1_vjp), np.zeros(VOCAB))
    assert agree(mean_gradient(divergence.k3_vjp), (p - q)[0])


@given(seed=seeds, temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_log_probabilities_are_of_the_distribution_at_the_temperature(
    seed: int, temperature: float
) -> None:
    logits, _ = two_distributions(seed)
    each = np.broadcast_to(logits, (1, VOCAB, VOCAB))
    found = divergence.log_probs(each, np.arange(VOCAB)[None], temperature)[0]
    weights = np.exp(logits[0, 0] / temperature)
    assert agree(np.exp(found), weights / weights.sum())


@given(seed=seeds)
def test_entropy_is_the_sum_and_leaves_out_what_cannot_be_drawn(seed: int) -> None:
    logits, ref_logits = two_distributions(seed)
    logits[..., :3] = -np.inf
    mask = np.ones((1, 1), bool)
    p = np.exp(logits[0, 0, 3:]) / np.exp(logits[0, 0, 3:]).sum()
    assert agree(divergence.entropy(logits, mask), [[-np.sum(p * np.log(p))]])
    log_q = (ref_logits - np.log(np.exp(ref_logits).sum()))[0, 0, 3:]
    assert agree(divergence.exact_kl(logits, ref_logits, mask), [[np.sum(p * (np.log(p) - log_q))]])
    for vjp in (
        divergence.entropy_vjp(logits, mask, np.ones((1, 1))),
        divergence.exact_kl_vjp(logits, ref_logits, mask, np.ones((1, 1))),
    ):
        assert not vjp[..., :3].any()
        assert np.isfinite(vjp).all()


def test_the_published_example_of_an_inverted_ratio() -> None:
    """Over eight tokens: k1 and k3 with pi / pi_0 and pi_0 / pi exchanged miss the KL by far."""
    p = np.array([0.7, 0.1, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])
    q = p[::-1].copy()
    mask = np.ones((1, 8), bool)
    exact = float(np.sum(p * np.log(p / q)))
    right, inverted = (np.log(p)[None], np.log(q)[None]), (np.log(q)[None], np.log(p)[None])
    for k in (divergence.k1, divergence.k3):
        assert agree(np.sum(p * k(*right, mask)), exact)
        assert abs(np.sum(p * k(*inverted, mask)) - exact) > 1
