"""transformers' Llama in float64, which test_conformance compares with the oracle."""

import numpy as np
import torch

from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.tolerances import FLOAT64_TOLERANCE, max_relative_error

from ..conformance.strategies import random_params


def test_without_the_lift_the_comparison_is_coarse() -> None:
    """Without the lift, transformers' float64 model computes in float32 inside."""
    import transformers  # late: it takes seconds

    from llama_parity.comparison.transformers_model import config_from

    config = LlamaConfig(16, 2, 4, 2, 4, 40, 30)
    params = random_params(config, 0)
    tokens = np.arange(10)[None]
    ours, _ = forward(params, tokens, config)
    hf = transformers.LlamaForCausalLM(config_from(config.to_hf(), config.n_layers)).double()
    hf.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    with torch.no_grad():
        theirs = hf(torch.from_numpy(tokens)).logits.numpy()
    assert FLOAT64_TOLERANCE < max_relative_error(ours, theirs) < 1e-5
