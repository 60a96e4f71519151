"""A Llama in NumPy: what stands here for your port. reader.py calls ``forward``."""

import numpy as np

NAMES = ("input_layernorm", "post_attention_layernorm")
NAMES += tuple(f"self_attn.{n}_proj" for n in "qkvo")
NAMES += tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


def norm(x, w, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rotate(x, c, positions):
    """Rotate each head's pairs (i, i + K / 2): [B, H, T, K], positions [B, T]."""
    s, half = c["rope_scaling"] or {}, c["head_dim"] // 2
    f = c["rope_theta"] ** (-np.arange(half) / half)
    kept = np.full(half, 0.0 if s.get("rope_type") == "linear" else 1.0)  # not divided
    if s.get("rope_type") == "llama3":
        turns = s["original_max_position_embeddings"] * f / (2 * np.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
    angle = positions[:, None, :, None] * (f * (kept + (1 - kept) / s.get("factor", 1.0)))
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(scores, mask):
    """Return the weights of the keys that may be seen, zeros where there is none."""
    scores = np.where(mask, scores, -np.inf)
    top = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo("f8").min)
    e = np.exp(scores - top)
    return e / np.maximum(e.sum(axis=-1, keepdims=True), np.finfo("f8").tiny)


def forward(w, c, tokens, positions, mask, cache):
    """Return the logits [B, T, V] and the cache with this call's keys and values.

    ``w``: arrays by Hugging Face's names; ``c``: config.json; ``tokens`` and ``positions`` [B, T];
    ``mask`` [B, T, S], true = may attend; ``cache``: of an earlier call, None before the first.
    """
    x, eps, present = w["model.embed_tokens.weight"][tokens].astype("f8"), c["rms_norm_eps"], []
    for layer in range(c["num_hidden_layers"]):
        p = {n: w[f"model.layers.{layer}.{n}.weight"] for n in NAMES}
        h = norm(x, p["input_layernorm"], eps)
        parts = [h @ p[f"self_attn.{n}_proj"].T for n in "qkv"]
        q, k, v = (y.reshape(*y.shape[:2], -1, c["head_dim"]).swapaxes(1, 2) for y in parts)
        q, k = rotate(q, c, positions), rotate(k, c, positions)
        if cache:
            k, v = (np.concatenate(pair, axis=2) for pair in zip(cache[layer], (k, v)))
        present.append((k, v))
        k, v = (np.repeat(y, q.shape[1] // k.shape[1], axis=1) for y in (k, v))
        weights = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(c["head_dim"]), mask[:, None])
        mixed = (weights @ v).swapaxes(1, 2).reshape(*tokens.shape, -1)
        x = x + mixed @ p["self_attn.o_proj"].T
        h = norm(x, p["post_attention_layernorm"], eps)
        gate = h @ p["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"], eps) @ head.T, present
