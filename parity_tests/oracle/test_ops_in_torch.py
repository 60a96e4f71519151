"""Each operation in torch: in float64 within FLOAT64_TOLERANCE, in float32 within its bound."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note
from hypothesis import strategies as st

from llama_torch.model import masks as torch_masks
from llama_torch.model import rope
from reference_np import ops
from reference_np.tolerances import (
    FLOAT64_TOLERANCE,
    LAMBDA,
    UNIT_ROUNDOFF,
    composed_bound,
    dot_bound,
    errors,
    max_relative_error,
)

from ..backends.torch_model import torch_config
from ..conformance.architectures import scalings, seeds
from ..conformance.strategies import Array, masks, positions_for
from ..support.oracle_inputs import draw_array, heads_of

pytestmark = pytest.mark.numeric

U32 = UNIT_ROUNDOFF["float32"]
widths = st.integers(1, 300)
scales = st.sampled_from([1e-4, 1.0, 1e3])


def assert_within(actual: Array, exact: Array, bound: Array) -> None:
    excess = np.abs(actual.astype(np.float64) - exact) - bound
    note(f"largest error beyond its bound: {excess.max()}")
    assert np.all(excess <= 0)  # false for NaN as well


@given(width=widths, rows=st.integers(1, 5), scale=scales, seed=seeds)
def test_rms_norm(width: int, rows: int, scale: float, seed: int) -> None:
    x, weight = draw_array(seed, rows, width, scale=scale), draw_array(seed + 1, width)
    x[0] *= 1e-3  # a near-zero row: epsilon decides it
    norm = torch.nn.RMSNorm(width, eps=1e-5, dtype=torch.float64)
    norm.weight.data = torch.from_numpy(weight)
    exact = ops.rms_norm(x, weight, 1e-5)
    assert (
        max_relative_error(norm(torch.from_numpy(x)).detach().numpy(), exact) <= FLOAT64_TOLERANCE
    )

    x32, weight32 = x.astype(np.float32), weight.astype(np.float32)
    exact = ops.rms_norm(x32.astype(np.float64), weight32.astype(np.float64), 1e-5)
    norm.weight.data = torch.from_numpy(weight32)
    # A mean of squares is a dot product of positive terms: its relative error is at most
    # lambda sqrt(n) u, halved by the root; squaring, root, division and product round once each.
    bound = (LAMBDA * np.sqrt(width) + 5) * U32 * np.abs(exact)
    for actual in (norm(torch.from_numpy(x32)).detach().numpy(), ops.rms_norm(x32, weight32, 1e-5)):
        assert actual.dtype == np.float32
        assert_within(actual, exact, bound)


@given(
    half=st.integers(1, 32),
    theta=st.sampled_from([1e4, 5e5]),
    scaling=scalings(),
    data=st.data(),
)
def test_rope_tables(half: int, theta: float, scaling: dict[str, Any], data: st.DataObject) -> None:
    config = heads_of(2 * half, rope_theta=theta, **scaling)
    positions = data.draw(positions_for(2, 5))
    tensor = torch.from_numpy(positions)
    for dtype, bound in ((np.float64, FLOAT64_TOLERANCE), (np.float32, 2 * U32)):
        expected = ops.rope_tables(positions, config, dtype)
        torch_dtype = torch.float64 if dtype == np.float64 else torch.float32
        actual = rope.rope_tables(tensor, torch_config(config), torch_dtype)
        for mine, theirs in zip(expected, actual, strict=True):
            assert mine.dtype == dtype
            assert theirs.dtype == torch_dtype
            assert np.abs(theirs[:, :, 0].numpy() - mine).max() <= bound


@given(seed=seeds, half=st.integers(1, 16), heads=st.integers(1, 5), data=st.data())
def test_apply_rope(seed: int, half: int, heads: int, data: st.DataObject) -> None:
    positions = data.draw(positions_for(2, 3))
    x, config = draw_array(seed, 2, 3, heads, 2 * half), heads_of(2 * half)
    tensor = torch.from_numpy(positions)
    tables = rope.rope_tables(tensor, torch_config(config), torch.float64)
    exact = ops.apply_rope(x, *ops.rope_tables(positions, config, np.float64))
    assert (
        max_relative_error(rope.apply_rope(torch.from_numpy(x), tables).numpy(), exact)
        <= FLOAT64_TOLERANCE
    )
    # A rotation keeps every pair's length, whatever the angle.
    lengths = np.hypot(*np.split(x, 2, axis=-1))
    np.testing.assert_allclose(np.hypot(*np.split(exact, 2, axis=-1)), lengths, rtol=1e-12)

    x32 = x.astype(np.float32)
    cos, sin = ops.rope_tables(positions, config, np.float32)
    wide = (x32.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64))
    exact, terms = ops.apply_rope(*wide), ops.apply_rope(*(np.abs(part) for part in wide))
    terms[..., :half] += 2 * np.abs(x32[..., half:]) * np.abs(sin)[:, :, None]  # abs of both terms
    actual = rope.apply_rope(
        torch.from_numpy(x32),
        (torch.from_numpy(cos)[:, :, None], torch.from_numpy(sin)[:, :, None]),
    )
    assert_within(actual.numpy(), exact, 3 * U32 * terms)


@given(rows=st.integers(1, 6), width=widths, out=st.integers(1, 40), scale=scales, seed=seeds)
def test_linear(rows: int, width: int, out: int, scale: float, seed: int) -> None:
    x, w = draw_array(seed, 2, rows, width, scale=scale), draw_array(seed + 1, out, width)
    actual = F.linear(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    assert max_relative_error(actual, ops.linear(x, w)) <= FLOAT64_TOLERANCE

    x32, w32 = x.astype(np.float32), w.astype(np.float32)
    wide = (x32.astype(np.float64), w32.astype(np.float64))
    exact, abs_dot = ops.linear(*wide), ops.linear(np.abs(wide[0]), np.abs(wide[1]))
    bound = dot_bound(abs_dot, exact, width, U32)
    assert_within(F.linear(torch.from_numpy(x32), torch.from_numpy(w32)).numpy(), exact, bound)
    assert_within(ops.linear(x32, w32), exact, bound)


def oracle_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Return attention [B, T, H, K] of q [B, T, H, K], k, v [B, N, S, K] and mask [B, T, S]."""
    scores = ops.attention_scores(ops.group_queries(q, k.shape[1]), k)
    return ops.ungroup_queries(ops.attention_mix(ops.masked_softmax(scores, mask), v))


@given(
    n_kv_heads=st.integers(1, 4),
    n_rep=st.integers(1, 4),
    half=st.integers(1, 16),
    n_queries=st.integers(1, 6),
    n_past=st.integers(0, 6),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=seeds,
    data=st.data(),
)
def test_attention(
    n_kv_heads: int,
    n_rep: int,
    half: int,
    n_queries: int,
    n_past: int,
    scale: float,
    seed: int,
    data: st.DataObject,
) -> None:
    n_keys = n_past + n_queries
    q = draw_array(seed, 2, n_queries, n_kv_heads * n_rep, 2 * half, scale=scale)
    k, v = (draw_array(seed + i, 2, n_kv_heads, n_keys, 2 * half) for i in (1, 2))
    mask = data.draw(masks(2, n_queries, n_keys))

    def torch_attention(dtype: torch.dtype) -> Array:
        tensors = (torch.from_numpy(x).to(dtype) for x in (q.swapaxes(1, 2), k, v))
        out = F.scaled_dot_product_attention(
            *tensors, torch.from_numpy(mask)[:, None], enable_gqa=True
        )
        return out.transpose(1, 2).numpy()

    assert (
        max_relative_error(torch_attention(torch.float64), oracle_attention(q, k, v, mask))
        <= FLOAT64_TOLERANCE
    )
    q, k, v = (x.astype(np.float32).astype(np.float64) for x in (q, k, v))
    exact = oracle_attention(q, k, v, mask)
    plain = oracle_attention(*(x.astype(np.float32) for x in (q, k, v)), mask)
    assert plain.dtype == np.float32
    actual, bound = errors(torch_attention(torch.float32), exact), attention_bound(q, k, v, exact)
    note(f"torch {actual}, plain {errors(plain, exact)}, bound {bound}")
    assert actual.worst <= max(bound, composed_bound(errors(plain, exact), "float32").worst)


def attention_bound(q: Array, k: Array, v: Array, exact: Array) -> float:
    """Return a relative bound of float32 attention: a score error d scales a weight by e^d.

    Scores are dot products (tier 2); the mix is another over at most S weights that sum to one.
    """
    size = np.abs(exact).max(initial=0.0)
    if size == 0:
        return 0.0
    width, keys = q.shape[-1], k.shape[2]
    # |q| . |k| / sqrt(K), the largest there is, times sqrt(K) roundings of a dot product.
    terms = ops.attention_scores(ops.group_queries(np.abs(q), k.shape[1]), np.abs(k)).max()
    score = LAMBDA * np.sqrt(width) * terms * U32
    mix = LAMBDA * np.sqrt(keys) * U32
    return float((2 * score + mix + 4 * U32) * np.abs(v).max() / size)


@given(n_queries=st.integers(1, 8), n_past=st.integers(0, 8))
def test_causal_mask(n_queries: int, n_past: int) -> None:
    n_keys = n_past + n_queries
    mask = ops.causal_mask(n_queries, n_keys)
    torch_mask = torch_masks.causal_mask(n_queries, n_keys, torch.device("cpu"))
    assert np.array_equal(torch_mask.numpy(), mask)
    for query in range(n_queries):
        assert mask[query].sum() == n_past + query + 1
        assert mask[query, : n_past + query + 1].all()


@given(x=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_silu(x: list[float]) -> None:
    values = np.array(x)
    exact = ops.silu(values)
    assert np.all(np.isfinite(exact))
    assert max_relative_error(F.silu(torch.from_numpy(values)).numpy(), exact) <= FLOAT64_TOLERANCE
    single = ops.silu(values.astype(np.float32))
    assert single.dtype == np.float32
    # exp, sum, product and quotient round once each, exp within two; below, results are
    # subnormal and lose digits without it meaning anything.
    bound = 8 * U32 * np.abs(exact) + float(np.finfo(np.float32).tiny)
    assert_within(single, exact, bound)
    assert_within(F.silu(torch.from_numpy(values.astype(np.float32))).numpy(), exact, bound)
