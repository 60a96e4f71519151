"""The whole model, every named activation, in both backends."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given

from reference_np import ops as reference_ops
from reference_np.config import InputError, LlamaConfig
from reference_np.model import forward
from reference_np.naming import activation_axes, parameter_shapes
from reference_np.tolerances import LOGIC, composed_bound, errors, kl_per_token, logic_error

from .strategies import Array, Case, cases, cast, packed, random_params, wide_cases
from .support import torch_forward, torch_model


def oracle_trace(case: Case, dtype: type) -> dict[str, Array]:
    trace: dict[str, Array] = {}
    forward(
        cast(case.params, dtype),
        case.tokens,
        case.config,
        positions=case.positions,
        mask=case.mask,
        trace=trace.__setitem__,
    )
    return trace


def torch_trace(case: Case, dtype: type) -> dict[str, Array]:
    model = torch_model(case.config, cast(case.params, dtype))
    _, _, trace = torch_forward(model, case.tokens, positions=case.positions, mask=case.mask)
    return trace


@given(case=cases())
def test_every_activation_in_float64(case: Case) -> None:
    exact, actual = oracle_trace(case, np.float64), torch_trace(case, np.float64)
    assert list(exact) == list(activation_axes(case.config))
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        assert actual[name].dtype == np.float64
        error = logic_error(actual[name], value)
        assert error <= LOGIC, f"{name}: {error}"


@given(case=wide_cases())
def test_every_activation_in_float32(case: Case) -> None:
    """Against the float64 oracle on the same rounded weights, beside the plain float32 oracle."""
    rounded = case._replace(params=cast(cast(case.params, np.float32), np.float64))
    exact, plain = oracle_trace(rounded, np.float64), oracle_trace(rounded, np.float32)
    actual = torch_trace(rounded, np.float32)
    for name, value in exact.items():
        assert plain[name].dtype == actual[name].dtype == np.float32
        error = errors(actual[name], value)
        bound = composed_bound(errors(plain[name], value), "float32")
        assert error.within(bound), f"{name}: {error}, bound {bound}"


@given(case=cases())
def test_names_axes_and_shapes(case: Case) -> None:
    config, trace = case.config, oracle_trace(case, np.float32)
    batch, length = case.tokens.shape
    sizes = {"B": batch, "T": length, "D": config.dim, "H": config.n_heads, "V": config.vocab_size}
    sizes |= {"N": config.n_kv_heads, "K": config.head_dim, "F": config.hidden_dim}
    for name, axes in activation_axes(config).items():
        assert trace[name].shape == tuple(sizes[axis] for axis in axes), name
    state = torch_model(config, case.params).state_dict()
    assert {n: tuple(v.shape) for n, v in state.items()} == parameter_shapes(config)


@given(case=cases())
def test_rows_of_a_batch_do_not_touch(case: Case) -> None:
    whole, _ = forward(
        case.params, case.tokens, case.config, positions=case.positions, mask=case.mask
    )
    for row in range(len(case.tokens)):
        one = slice(row, row + 1)
        alone, _ = forward(
            case.params,
            case.tokens[one],
            case.config,
            positions=None if case.positions is None else case.positions[one],
            mask=None if case.mask is None else case.mask[one],
        )
        assert logic_error(whole[one], alone) <= LOGIC


@given(case=cases())
def test_packed_documents_equal_separate_ones(case: Case) -> None:
    lengths = [case.tokens.shape[1]] * len(case.tokens)
    lengths[0] = max(1, lengths[0] - 2)
    rows = [row[:n] for row, n in zip(case.tokens, lengths, strict=True)]
    positions, mask = packed(lengths)
    tokens = np.concatenate(rows)[None]
    whole, _ = forward(case.params, tokens, case.config, positions=positions, mask=mask)
    model = torch_model(case.config, case.params)
    torch_whole, _, _ = torch_forward(model, tokens, positions=positions, mask=mask)
    start = 0
    for row in rows:
        alone, _ = forward(case.params, row[None], case.config)
        part = slice(start, start + len(row))
        assert logic_error(whole[:, part], alone) <= LOGIC
        assert logic_error(torch_whole[:, part], alone) <= LOGIC
        start += len(row)


def test_kl_of_honest_float32_is_tiny() -> None:
    config = LlamaConfig(64, 4, 8, 2, 8, 172, 500)
    case = Case(config, random_params(config, 0), np.arange(40).reshape(2, 20), None, None)
    exact, actual = oracle_trace(case, np.float64), torch_trace(case, np.float32)
    kl = kl_per_token(actual["logits"], exact["logits"])
    # KL is quadratic in the logits' error, some 1e-6 here.
    assert 0 <= kl.max() < 1e-9


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


def _tiled(q: Array, n_kv_heads: int) -> Array:
    batch, length, _, width = q.shape
    return q.reshape(batch, length, -1, n_kv_heads, width).transpose(0, 3, 2, 1, 4)


def _interleaved(x: Array, cos: Array, sin: Array) -> Array:
    pairs = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    turned = np.split(reference_ops.apply_rope(pairs, cos, sin), 2, axis=-1)
    return np.stack(turned, axis=-1).reshape(x.shape)


FORWARD_BUGS = {
    "eps 1e-6": {"rms_norm": lambda x, w, eps: reference_ops.rms_norm(x, w, 1e-6)},
    "eps outside the root": {
        "rms_norm": lambda x, w, eps: x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + eps) * w
    },
    "variance": {"rms_norm": lambda x, w, eps: w * x / np.sqrt(x.var(-1, keepdims=True) + eps)},
    "KV heads tiled": {"group_queries": _tiled},
    "interleaved RoPE": {"apply_rope": _interleaved},
    "theta ignored": {
        "rope_tables": lambda p, k, theta, dtype: reference_ops.rope_tables(p, k, 1e4, dtype)
    },
    "position + 1 in keys": {
        "attention_scores": lambda q, k: reference_ops.attention_scores(q, np.roll(k, 1, axis=2))
    },
    "silu on up": {"swiglu": lambda gate, up: gate * reference_ops.silu(up)},
}


@pytest.mark.parametrize("bug", FORWARD_BUGS)
def test_forward_bugs_cross_the_tolerance_ten_times(bug: str) -> None:
    """A tolerance that no bug crosses is a test that cannot fail."""
    config = LlamaConfig(24, 2, 6, 2, 8, 40, 50, rope_theta=5e5)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    case = Case(config, random_params(config, 0), tokens, None, None)
    broken = SimpleNamespace(**(vars(reference_ops) | FORWARD_BUGS[bug]))
    wrong, _ = forward(case.params, tokens, config, ops=broken)
    assert logic_error(torch_trace(case, np.float64)["logits"], wrong) >= 10 * LOGIC
