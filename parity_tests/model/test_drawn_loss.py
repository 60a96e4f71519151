"""Log-probabilities of drawn tokens and their gradients, in chunks, beside the oracle's."""

import math

import numpy as np
import pytest
import torch

from llama_torch.model import drawn_loss
from reference_np import divergence
from reference_np.tolerances import UNIT_ROUNDOFF

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("positions", [1, 7, 100])
def test_they_are_the_oracles_in_chunks_of_any_size(
    positions: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_loss, "CHUNK_BYTES", 8 * 23 * positions)
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((10, 5)), rng.standard_normal((23, 5))
    targets, d_out = rng.integers(0, 23, 10), rng.standard_normal(10)
    logits, ones = (hidden @ head.T)[None], np.ones((1, 10), bool)
    right = divergence.log_probs(logits, targets[None], temperature)[0]
    entropy = divergence.entropy(logits / temperature, ones)[0]
    d_logits = divergence.log_probs_vjp(logits, targets[None], d_out[None], temperature)[0]
    given = torch.tensor(hidden), torch.tensor(head), torch.tensor(targets)
    found = drawn_loss.log_probs(*given, temperature)
    given[1].grad = torch.ones_like(given[1])  # of an earlier micro-batch
    derivatives = torch.tensor(d_out)
    *again, d_hidden = drawn_loss.backward_log_probs(
        *given, temperature, lambda log_p, part: derivatives[part] * (log_p / log_p)
    )
    for one, two in (found, again):
        np.testing.assert_allclose(one, right, rtol=0, atol=1e-12)
        np.testing.assert_allclose(two, entropy, rtol=0, atol=1e-12)
    np.testing.assert_allclose(d_hidden, d_logits @ head, rtol=0, atol=1e-12)
    assert given[1].grad is not None
    np.testing.assert_allclose(given[1].grad - 1, d_logits.T @ hidden, rtol=0, atol=1e-12)


def test_a_large_vocabulary_adds_up_without_losing_digits() -> None:
    """One likely token, and 50,256 alike: each is a few roundings of the sum of all.

    One number is the hidden state, so that no product rounds: all errors are the softmax's.
    """
    vocabulary = 50257
    rng = np.random.default_rng(0)
    logits = (0.4 * rng.standard_normal(vocabulary)).astype(np.float32)
    logits[7] = 16
    targets = np.argsort(logits)[:: vocabulary // 8]
    n = len(targets)
    exact = divergence.log_probs(
        np.broadcast_to(logits.astype(np.float64), (1, n, vocabulary)), targets[None]
    )[0]
    found, _ = drawn_loss.log_probs(
        *(torch.ones(n, 1), torch.tensor(logits)[:, None], torch.tensor(targets)), 1.0
    )
    # Of a sum in pairs, of both logarithms, and of what is subtracted from what.
    roundings = math.log2(vocabulary) + 8 + 2 * np.abs(exact)
    assert (np.abs(found.numpy() - exact) <= roundings * UNIT_ROUNDOFF["float32"]).all()


def test_impossible_tokens_have_no_share_in_the_entropy() -> None:
    head = torch.tensor([[0.0], [0.0], [-math.inf]])
    log_p, entropy = drawn_loss.log_probs(torch.ones(1, 1), head, torch.tensor([0]), 1.0)
    assert log_p.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
