"""A Llama in JAX as a backend, written for this suite from the equations alone.

It uses einsum and automatic differentiation of a pure function, and shares no code with the
oracle. ``pip install 'llama-parity[jax]'``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch

from .mixins import LogitsByDecode

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")


def norm(x: jax.Array, w: jax.Array, eps: float) -> jax.Array:
    """Return RMSNorm [..., D], computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (scaled * w).astype(x.dtype)


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Return the rotary frequencies [K / 2], scaled by the config's rope_type."""
    plain = config.rope_theta ** -(np.arange(config.head_dim // 2) / (config.head_dim // 2))
    if config.rope_type == "default":
        return plain
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = plain * config.rope_original_max_seq_len / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1) if config.rope_type == "llama3" else 0.0
    return kept * plain + (1 - kept) * plain / config.rope_factor


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate x [B, T, H, K] by angles [B, T, 1, K / 2], as complex numbers."""
    half = x.shape[-1] // 2
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z = jax.lax.complex(wide[..., :half], wide[..., half:])
    z = z * jnp.exp(1j * angles).astype(z.dtype)
    return jnp.concatenate([z.real, z.imag], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Return attention [B, T, H * K] of q [B, T, H, K], k, v [B, S, N, K], mask [B, T, S]."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btnrk,bsnk->bnrts", q, k, preferred_element_type=wide)
    scores = jnp.where(mask[:, None, None], scores / np.sqrt(q.shape[-1]), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bnrts,bsnk->btnrk", weights, v)
    return mixed.reshape(*mixed.shape[:2], -1)


def forward(
    config: LlamaConfig,
    params: Mapping[str, jax.Array],
    tokens: jax.Array,
    positions: jax.Array | None,
    mask: jax.Array | None,
    cache: list | None,
) -> tuple[jax.Array, list]:
    """Return logits [B, T, V] and the cache: each layer's keys and values [B, S, N, K]."""
    start = 0 if cache is None else cache[0][0].shape[1]
    length = tokens.shape[1]
    if positions is None:
        positions = start + jnp.arange(length)[None]
    if mask is None:
        mask = jnp.arange(start + length) <= start + jnp.arange(length)[:, None]
        mask = mask[None]
    angles = positions[..., None, None] * frequencies(config)
    x, kept = params["model.embed_tokens.weight"][tokens], []
    for i in range(config.n_layers):
        p = {n.split(".", 3)[3]: v for n, v in params.items() if n.startswith(f"model.layers.{i}.")}
        h = norm(x, p["input_layernorm.weight"], config.norm_eps)
        q, k, v = (
            (h @ p[f"self_attn.{n}_proj.weight"].T).reshape(*h.shape[:2], -1, config.head_dim)
            for n in "qkv"
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cache[i], (k, v), strict=True))
        kept.append((k, v))
        x = x + attend(q, k, v, mask) @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"], config.norm_eps)
        hidden = jax.nn.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)
        x = x + hidden @ p["mlp.down_proj.weight"].T
    x = norm(x, params["model.norm.weight"], config.norm_eps)
    return x @ params.get("lm_head.weight", params["model.embed_tokens.weight"]).T, kept


def loss_sum(
    params: Mapping[str, jax.Array], batch: Batch, config: LlamaConfig, z_loss: float
) -> jax.Array:
    """Return the summed loss of the valid targets."""
    logits, _ = forward(config, params, *(_array(batch[i]) for i in (0, 2, 3)), None)
    targets, counts = jnp.maximum(batch.targets, 0), batch.targets != -100
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(counts, log_z - chosen + z_loss * log_z**2, 0.0))


def _array(value: Array | None) -> jax.Array | None:
    return None if value is None else jnp.asarray(value)


class Jax(LogitsByDecode):
    """The functions above as a backend."""

    dtypes = ("float64", "float32")
    example_fraction = 0.2  # every operation of every new shape is compiled

    def decode(
        self, config: Any, params: Params, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Array, list]:
        arrays = {name: jnp.asarray(value) for name, value in params.items()}
        given = (_array(x) for x in (tokens, positions, mask))
        logits, cache = forward(config, arrays, *given, cache)
        return np.asarray(logits), cache

    def loss_and_grads(
        self, config: Any, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        arrays = {name: jnp.asarray(value) for name, value in params.items()}
        count = sum(np.sum(batch.targets != -100) for batch in batches)
        found = [jax.value_and_grad(loss_sum)(arrays, b, config, z_loss) for b in batches]
        grads = {n: np.asarray(sum(g[n] for _, g in found) / count) for n in params}
        return float(sum(loss for loss, _ in found) / count), grads


backend = Jax()
