"""Measure the oracle beside its own matrix products, and beside a plain NumPy Llama.

No NumPy program of a shape is faster than its products; the rest of the oracle's time is
overhead. The peer is Llama as it is commonly written in NumPy.

Axes as in reference_np.ops: B batch, T query position, S key position, D dim, H query heads,
N key/value heads, K head_dim, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reference_np.config import LlamaConfig
from reference_np.model import forward
from reference_np.naming import EMBED, LM_HEAD, NORM, layer_shapes, parameter_shapes
from reference_np.ops import Array, group_queries

PlainCache = list[tuple[Array, Array]]  # each layer's keys and values, both [B, S, N, K]


class Trio(NamedTuple):
    """One work as three functions without arguments: oracle, peer, the oracle's products alone."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    products: Callable[[], object]


def prefill(config: LlamaConfig, length: int, seed: int) -> Trio:
    """Return the forward pass of ``length`` tokens without a cache."""
    params, tokens = random_model(config, length, seed)

    def ours() -> Array:
        return forward(params, tokens, config)[0]

    def peer() -> Array:
        return plain_forward(params, tokens, config)[0]

    assert_same(ours(), peer())
    return Trio(ours, peer, products(params, config, [(length, length)], seed))


def decode(config: LlamaConfig, start: int, steps: int, seed: int) -> Trio:
    """Return ``steps`` forward passes of one token each, on a cache of ``start`` tokens."""
    params, tokens = random_model(config, start + steps, seed)
    _, cache = forward(params, tokens[:, :start], config)
    _, plain_cache = plain_forward(params, tokens[:, :start], config)
    new = [tokens[:, t : t + 1] for t in range(start, start + steps)]

    def ours() -> Array:
        logits, grown = [], cache
        for token in new:
            logits_BTV, grown = forward(params, token, config, cache=grown)
            logits.append(logits_BTV)
        return np.concatenate(logits, axis=1)

    def peer() -> Array:
        logits, grown = [], plain_cache
        for token in new:
            logits_BTV, grown = plain_forward(params, token, config, grown)
            logits.append(logits_BTV)
        return np.concatenate(logits, axis=1)

    assert_same(ours(), peer())
    calls = [(1, start + step + 1) for step in range(steps)]
    return Trio(ours, peer, products(params, config, calls, seed))


def random_model(config: LlamaConfig, length: int, seed: int) -> tuple[dict[str, Array], Array]:
    """Return float32 parameters that keep activations near one, and token ids [1, T]."""
    rng = np.random.default_rng(seed)
    params = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.standard_normal(shape) / math.sqrt(shape[1])).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return params, rng.integers(0, config.vocab_size, (1, length))


def assert_same(ours: Array, peer: Array) -> None:
    """Raise RuntimeError where two sides' logits differ by more than float32 rounds."""
    error = np.abs(ours - peer).max() / np.abs(peer).max()
    if not error <= 1e-4:  # over a few layers
        raise RuntimeError(f"the two sides' logits differ by {error:.1e} of the largest")


def products(
    params: Mapping[str, Array],
    config: LlamaConfig,
    calls: Sequence[tuple[int, int]],
    seed: int,
) -> Callable[[], None]:
    """Return a function that runs the oracle's matrix products, for ``calls`` of (T, S) each.

    Weights, shapes and layouts are those of the forward pass; other operands are drawn before.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    groups, repeats, width = config.n_kv_heads, config.n_rep, config.head_dim
    head = params[EMBED if config.tie_embeddings else LM_HEAD]
    matrices = [name for name, shape in layer_shapes(config).items() if len(shape) == 2]
    sizes = {params[f"model.layers.0.{name}"].shape[1] for name in matrices}
    # Each layer has its own keys and values, so that they are as rarely in cache as the oracle's.
    longest = max(n_keys for _, n_keys in calls)
    cached = [draw(2, 1, longest, groups, width).swapaxes(2, 3) for _ in range(config.n_layers)]
    operands: list[tuple[Array, Array]] = []
    for length, n_keys in calls:
        inputs = {size: draw(length, size) for size in sizes}
        q_BNRTK = group_queries(draw(1, length, config.n_heads, width), groups)
        q_BNTK = q_BNRTK.reshape(1, groups, repeats * length, width)
        weights_BNTS = draw(1, groups, repeats * length, n_keys)
        for i in range(config.n_layers):
            k_BNSK, v_BNSK = cached[i][:, :, :, :n_keys]
            operands += [(q_BNTK, k_BNSK.swapaxes(-1, -2)), (weights_BNTS, v_BNSK)]
            weights = [params[f"model.layers.{i}.{name}"] for name in matrices]
            operands += [(inputs[weight.shape[1]], weight.T) for weight in weights]
        operands.append((inputs[config.dim], head.T))

    def run() -> None:
        for left, right in operands:
            np.matmul(left, right)

    return run


# The peer: the habits of plain NumPy code that cost time.


def plain_forward(
    params: Mapping[str, Array],
    tokens_BT: Array,
    config: LlamaConfig,
    cache: PlainCache | None = None,
) -> tuple[Array, PlainCache]:
    """Return logits [B, T, V] and the longer cache, as a Llama in NumPy commonly computes them.

    Tables and mask are float64, which widens the activations, and computed anew in every call; each
    key/value head is copied for its query heads; softmax and SiLU are their textbook forms.
    """
    start = 0 if cache is None else cache[0][0].shape[1]
    length = tokens_BT.shape[1]
    x = params[EMBED][tokens_BT]
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.outer(np.arange(start + length), frequencies)[start:]
    cos, sin = np.cos(angles), np.sin(angles)
    mask = np.hstack([np.zeros((length, start)), np.triu(np.full((length, length), -np.inf), 1)])
    grown = []
    for i in range(config.n_layers):
        layer = {name: params[f"model.layers.{i}.{name}"] for name in layer_shapes(config)}
        past = None if cache is None else cache[i]
        h = plain_norm(x, layer["input_layernorm.weight"], config.norm_eps)
        h, present = plain_attention(layer, h, config, cos, sin, mask, past)
        grown.append(present)
        x = x + h
        h = plain_norm(x, layer["post_attention_layernorm.weight"], config.norm_eps)
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h @ layer["mlp.up_proj.weight"].T
        x = x + (gate * (1 / (1 + np.exp(-gate))) * up) @ layer["mlp.down_proj.weight"].T
    x = plain_norm(x, params[NORM], config.norm_eps)
    return x @ params[EMBED if config.tie_embeddings else LM_HEAD].T, grown


def plain_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return x / rms(x) * weight over the last axis."""
    y: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    return y


def plain_rope(x_BTHK: Array, cos: Array, sin: Array) -> Array:
    """Return queries or keys with their pairs (i, i + K / 2) rotated; cos, sin [T, K / 2]."""
    first, second = np.split(x_BTHK, 2, axis=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def plain_attention(
    layer: Mapping[str, Array],
    h_BTD: Array,
    config: LlamaConfig,
    cos: Array,
    sin: Array,
    mask: Array,
    past: tuple[Array, Array] | None,
) -> tuple[Array, tuple[Array, Array]]:
    """Return self-attention's output [B, T, D] and the longer keys and values [B, S, N, K]."""
    batch, length, _ = h_BTD.shape
    q, k, v = (
        (h_BTD @ layer[f"self_attn.{name}_proj.weight"].T).reshape(
            batch, length, -1, config.head_dim
        )
        for name in "qkv"
    )
    q, k = plain_rope(q, cos, sin), plain_rope(k, cos, sin)
    if past is not None:
        k, v = np.concatenate([past[0], k], axis=1), np.concatenate([past[1], v], axis=1)
    keys, values = (np.repeat(x, config.n_rep, axis=2).transpose(0, 2, 1, 3) for x in (k, v))
    scores = q.transpose(0, 2, 1, 3) @ keys.transpose(0, 1, 3, 2) / np.sqrt(config.head_dim)
    scores = scores + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = (weights @ values).transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return mixed @ layer["self_attn.o_proj.weight"].T, (k, v)
