"""The cache is a value: any split of a sequence gives what one pass gives."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference_np.model import Cache, forward
from reference_np.tolerances import LOGIC, logic_error

from .strategies import (
    Array,
    Params,
    caches_equal,
    configs,
    left_padded,
    params_of,
    splits,
    tokens_of,
)
from .support import torch_forward, torch_model


@st.composite
def split_runs(draw: st.DrawFn) -> tuple:
    config = draw(configs())
    tokens = draw(tokens_of(config, min_length=2))
    return config, draw(params_of(config)), tokens, draw(splits(tokens.shape[1]))


@given(run=split_runs())
def test_any_split_equals_the_full_pass(run: tuple) -> None:
    config, params, tokens, sizes = run
    full, full_cache = forward(params, tokens, config)
    model = torch_model(config, params)
    parts, torch_parts, cache, torch_cache, start = [], [], None, None, 0
    for size in sizes:
        chunk = tokens[:, start : start + size]
        logits, cache = forward(params, chunk, config, cache=cache)
        torch_logits, torch_cache, _ = torch_forward(model, chunk, cache=torch_cache)
        parts.append(logits)
        torch_parts.append(torch_logits)
        start += size
        assert cache.length == torch_cache.length == start
    assert logic_error(np.concatenate(parts, 1), full) <= LOGIC
    assert logic_error(np.concatenate(torch_parts, 1), full) <= LOGIC
    for ours, torch_s in zip(full_cache.keys, torch_cache.keys, strict=True):
        assert logic_error(torch_s.numpy(), ours) <= LOGIC


@given(run=split_runs())
def test_the_same_call_gives_the_same_answer(run: tuple) -> None:
    config, params, tokens, _ = run
    _, cache = forward(params, tokens[:, :-1], config)
    before = Cache(tuple(k.copy() for k in cache.keys), tuple(v.copy() for v in cache.values))
    first, longer = forward(params, tokens[:, -1:], config, cache=cache)
    forward(params, tokens[:, :1], config, cache=longer)
    second, _ = forward(params, tokens[:, -1:], config, cache=cache)
    assert np.array_equal(first, second)
    assert caches_equal(cache, before)

    model = torch_model(config, params)
    _, torch_cache, _ = torch_forward(model, tokens[:, :-1])
    first, longer_torch, _ = torch_forward(model, tokens[:, -1:], cache=torch_cache)
    torch_forward(model, tokens[:, :1], cache=longer_torch)
    second, _, _ = torch_forward(model, tokens[:, -1:], cache=torch_cache)
    assert np.array_equal(first, second)


def padded_rows(rows: list[Array]) -> tuple[Array, Array, Array]:
    """Tokens, positions and mask of rows padded on the left with id 0."""
    longest = max(len(row) for row in rows)
    tokens = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    return tokens, *left_padded([len(row) for row in rows])


@given(config=configs(), data=st.data())
def test_left_padded_prefill_and_decode(config, data: st.DataObject) -> None:
    params: Params = data.draw(params_of(config))
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3), label="lengths")
    new = data.draw(tokens_of(config))[:1, :2]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, config.vocab_size, n) for n in lengths]
    tokens, positions, mask = padded_rows(rows)
    model = torch_model(config, params)
    prefill, cache = forward(params, tokens, config, positions=positions, mask=mask)
    torch_prefill, torch_cache, _ = torch_forward(model, tokens, positions=positions, mask=mask)
    # Decoding: new tokens see every real key of their row and each other causally.
    n_new = new.shape[1]
    real = mask[:, -1]
    causal = np.tril(np.ones((n_new, n_new), bool))
    seen = np.concatenate(
        [np.repeat(real[:, None], n_new, 1), np.repeat(causal[None], len(rows), 0)], axis=2
    )
    ahead = positions[:, -1:] + 1 + np.arange(n_new)
    same = np.repeat(new, len(rows), axis=0)
    decoded, _ = forward(params, same, config, positions=ahead, mask=seen, cache=cache)
    torch_decoded, _, _ = torch_forward(model, same, positions=ahead, mask=seen, cache=torch_cache)
    for i, row in enumerate(rows):
        alone, _ = forward(params, np.concatenate([row, new[0]])[None], config)
        for prefilled, continued in ((prefill, decoded), (torch_prefill, torch_decoded)):
            assert logic_error(prefilled[i, -len(row) :], alone[0, : len(row)]) <= LOGIC
            assert logic_error(continued[i], alone[0, len(row) :]) <= LOGIC
