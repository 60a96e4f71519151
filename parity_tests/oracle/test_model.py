"""The whole model: names, arguments, and the known bugs."""

import numpy as np
import pytest
from hypothesis import given

from reference_np import ops as reference_ops
from reference_np.config import InputError, LlamaConfig
from reference_np.model import forward
from reference_np.mutants import FORWARD, Mutant
from reference_np.naming import activation_axes
from reference_np.tolerances import (
    FLOAT64_TOLERANCE,
    max_relative_error,
)

from ..conformance.strategies import Array, Case, cases, random_params
from ..support.oracle_inputs import oracle_trace

pytestmark = pytest.mark.numeric


@given(case=cases())
def test_names_axes_and_shapes(case: Case) -> None:
    config, trace = case.config, oracle_trace(case, np.float32)
    batch, length = case.tokens.shape
    sizes = {"B": batch, "T": length, "D": config.dim, "H": config.n_heads, "V": config.vocab_size}
    sizes |= {"N": config.n_kv_heads, "K": config.head_dim, "F": config.hidden_dim}
    for name, axes in activation_axes(config).items():
        assert trace[name].shape == tuple(sizes[axis] for axis in axes), name


@given(case=cases())
def test_nothing_given_or_traced_is_written_to(case: Case) -> None:
    """Arguments, traced activations and caches are read-only here: writing to them raises."""

    def freeze(name: str, value: Array) -> None:
        value.flags.writeable = False

    arguments = {"positions": case.positions, "mask": case.mask}
    given = case.params | {"tokens": case.tokens} | arguments
    for name, value in given.items():
        if value is not None:
            freeze(name, value)
    _, cache = forward(case.params, case.tokens, case.config, trace=freeze, **arguments)
    for value in (*cache.keys, *cache.values):
        freeze("cache", value)
    forward(case.params, case.tokens[:, :1], case.config, cache=cache, trace=freeze)


GOOD = LlamaConfig(8, 1, 2, 1, 4, 8, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.array([[1, 10]])}, "token id 10 is outside the vocabulary of 10"),
        ({"tokens": np.array([[-1, 0]])}, "token id -1"),
        ({"tokens": np.array([1, 2])}, "tokens must be"),
        ({"tokens": np.array([[1.0, 2.0]])}, "tokens must be"),
        ({"tokens": np.zeros((1, 0), int)}, "tokens must be non-empty"),
        ({"positions": np.zeros((1, 3), int)}, "positions must be"),
        ({"mask": np.ones((1, 2, 3), bool)}, "mask must be"),
        ({"mask": np.ones((1, 2, 2), int)}, "mask must be bool"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Array], message: str) -> None:
    arguments = {"tokens": np.array([[1, 2]])} | change
    tokens = arguments.pop("tokens")
    with pytest.raises(InputError, match=message):
        forward(random_params(GOOD, 0), tokens, GOOD, **arguments)


@pytest.mark.parametrize("mutant", FORWARD, ids=lambda mutant: mutant.name)
def test_known_bugs_cross_the_tolerance_ten_times(mutant: Mutant) -> None:
    """On four fixed models; ``--mutants`` measures them on the whole suite."""
    wrong = mutant.apply(reference_ops)
    margins = []
    changes = [
        {"rope_theta": 5e5},
        {"rope_theta": 37.5, "tie_embeddings": True},
        {},
        {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_max_seq_len": 300},
    ]
    for seed, change in enumerate(changes):
        config = LlamaConfig(24, 2, 6, 2, 12, 40, 50, **change)
        params = random_params(config, seed)
        tokens = np.random.default_rng(seed).integers(0, 50, (2, 9))
        positions = np.array([np.arange(9) + 60_000, np.arange(9)])
        honest, broken = ([], [])
        for ops, found in ((reference_ops, honest), (wrong, broken)):
            logits, cache = forward(params, tokens, config, positions=positions, ops=ops)
            found.append(logits)
            for length in (3, 1):
                new = tokens[:, :length]
                logits, cache = forward(params, new, config, cache=cache, ops=ops)
                found.append(logits)
        margins += [
            max_relative_error(a, b) / FLOAT64_TOLERANCE
            for a, b in zip(broken, honest, strict=True)
        ]
    assert max(margins) >= 10
