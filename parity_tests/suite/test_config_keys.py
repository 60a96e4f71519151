"""The values of config.json's keys are far enough from others' to tell which one was read."""

import numpy as np
import pytest

from reference_np.tolerances import FLOAT64_TOLERANCE, UNIT_ROUNDOFF, errors

from ..conformance.bounds import Bounds
from ..conformance.case_parts import oracle_logits, rounded_to
from ..conformance.config_keys import KEYS, LENGTH, PLAIN_NAME, named
from ..conformance.directories import VERSIONS
from ..conformance.strategies import random_params


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_is_not_read_changes_the_logits_far_beyond_a_tolerance(
    name: str, dtype: str
) -> None:
    """A value that changed little would hide that it is not read."""
    key = KEYS[name]
    params = rounded_to(dtype, random_params(key.config, 0, embed_scale=0.3))
    tokens = np.random.default_rng(0).integers(0, key.config.vocab_size, (1, LENGTH))
    exact = oracle_logits(params, key.config, tokens)
    bounds = Bounds(
        dtype,
        lambda model: {"logits": model.logits(key.config, params, tokens, None, None)},
        FLOAT64_TOLERANCE,
        rms_only=False,
        float32_angles=False,
    )
    for value, config in (key.unread | key.lost if key.is_key else {}).items():
        other = oracle_logits(params, config, tokens)
        assert errors(other, exact).rms > 0.01, value
        assert max(one.share for one in bounds.shares("logits", other, exact)) > 4, value


def test_another_usual_value_changes_the_logits_beyond_a_tolerance() -> None:
    """In 16 bits an epsilon of 1e-6 is no different from 1e-5."""
    for name in (named(PLAIN_NAME, version) for version in VERSIONS):
        key = KEYS[name]
        params = random_params(key.config, 0, embed_scale=0.3)
        tokens = np.random.default_rng(0).integers(0, key.config.vocab_size, (1, LENGTH))
        exact = oracle_logits(params, key.config, tokens)
        for value, config in key.unread.items():
            assert errors(oracle_logits(params, config, tokens), exact).rms > 1e-6, value
