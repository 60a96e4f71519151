"""Speculative decoding: draft tokens, accepted or not, never change the tokens sampled."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import InputError
from llama_torch.inference.config import SamplingConfig
from llama_torch.inference.engine import DecodeBatch, generate, generate_tokens
from llama_torch.inference.speculative import speculative_batch
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama

from ..backends.torch_model import torch_model
from ..conformance.strategies import Case, cast, random_params, wide_cases

pytestmark = pytest.mark.numeric


def token_ids(batch: DecodeBatch) -> list[int]:
    return [token.id for token in generate_tokens(batch)]


@given(
    case=wide_cases(),
    kind=st.sampled_from(["the model", "another", "nearly the model"]),
    n_draft_tokens=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.9]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_tokens_equal_those_without_a_draft(
    case: Case, kind: str, n_draft_tokens: int, temperature: float, penalty: float
) -> None:
    params = cast(case.params, np.float64)
    model = torch_model(case.config, params)
    other = cast(random_params(case.config, 5), np.float64)
    share = {"the model": 0.0, "another": 1.0, "nearly the model": 0.1}[kind]
    mixed = {name: (1 - share) * params[name] + share * other[name] for name in params}
    draft = torch_model(case.config, mixed)
    prompt = case.tokens[0, :3].tolist()
    settings = SamplingConfig(12, temperature, repetition_penalty=penalty, seed=3)
    plain = list(generate(model, prompt, settings))
    assert (
        token_ids(speculative_batch(model, draft, prompt, settings, n_draft_tokens=n_draft_tokens))
        == plain
    )


@given(case=wide_cases(), n_draft_tokens=st.integers(1, 6))
def test_accepted_draft_tokens_save_forward_passes(case: Case, n_draft_tokens: int) -> None:
    """The model as its own draft: every draft token is accepted, n + 1 tokens a forward pass."""
    params = cast(case.params, np.float64)
    model, draft = (torch_model(case.config, params) for _ in range(2))
    settings = SamplingConfig(12, temperature=0)
    batch = speculative_batch(
        model, draft, case.tokens[0, :3].tolist(), settings, n_draft_tokens=n_draft_tokens
    )
    with patch.object(model.model, "forward", wraps=model.model.forward) as passes:
        tokens = token_ids(batch)
    # The first token needs none but the prompt's own pass.
    assert passes.call_count == 1 + -(-(len(tokens) - 1) // (n_draft_tokens + 1))


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    small = ModelConfig(8, 1, 2, 1, hidden_dim=12, vocab_size=50)
    model, draft = Llama(small), Llama(replace(small, vocab_size=60))
    with pytest.raises(InputError, match="vocabulary has 60 tokens and the model's 50"):
        speculative_batch(model, draft, [1], SamplingConfig(4))
    with pytest.raises(InputError, match="numpy cannot verify draft tokens"):
        speculative_batch(model, model, [1], SamplingConfig(4), decoding="numpy")
