"""Compute the logits of every golden vector that has calls, and compare them with the file's.

NumPy alone:  python reader.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "?"}


def load(path):
    """Return the tensors and the metadata of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:start]), {}
    metadata = header.pop("__metadata__")
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        data = np.frombuffer(content[start + first : start + end], DTYPES[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors, metadata


def norm(x, w, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rotate(x, c, positions):
    """Rotate each head's pairs (i, i + K / 2): [B, H, T, K], positions [B, T]."""
    s, half = c["rope_scaling"] or {}, c["head_dim"] // 2
    f = c["rope_theta"] ** (-np.arange(half) / half)
    kept = np.full(half, 0.0 if s.get("rope_type") == "linear" else 1.0)
    if s.get("rope_type") == "llama3":
        turns = s["original_max_position_embeddings"] * f / (2 * np.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
    angle = positions[:, None, :, None] * (f * (kept + (1 - kept) / s.get("factor", 1.0)))
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(w, c, tokens, positions, mask, cache):
    """Return the logits [B, T, V] and the new cache; mask [B, T, S]."""
    x, eps, new = w["model.embed_tokens.weight"][tokens].astype("f8"), c["rms_norm_eps"], []
    for layer in range(c["num_hidden_layers"]):
        p = {n: w[f"model.layers.{layer}.{n}.weight"] for n in NAMES}
        h = norm(x, p["input_layernorm"], eps)
        parts = [h @ p[f"self_attn.{n}_proj"].T for n in "qkv"]
        q, k, v = (y.reshape(*y.shape[:2], -1, c["head_dim"]).swapaxes(1, 2) for y in parts)
        q, k = rotate(q, c, positions), rotate(k, c, positions)
        if cache:
            k, v = (np.concatenate(pair, axis=2) for pair in zip(cache[layer], (k, v)))
        new.append((k, v))
        k, v = (np.repeat(y, q.shape[1] // k.shape[1], axis=1) for y in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(c["head_dim"])
        e = np.exp(scores - scores.max(axis=-1, keepdims=True)) * mask[:, None]
        mixed = (e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-300)) @ v
        mixed = mixed.swapaxes(1, 2).reshape(*tokens.shape, -1)
        x = x + mixed @ p["self_attn.o_proj"].T
        h = norm(x, p["post_attention_layernorm"], eps)
        gate = h @ p["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"], eps) @ head.T, new


NAMES = ("input_layernorm", "post_attention_layernorm")
NAMES += tuple(f"self_attn.{n}_proj" for n in "qkvo")
NAMES += tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


def shares(folder, index, case):
    """Yield the error of each call's logits over its bound."""
    model, caches = index["models"][case["model"]], []
    w, (given, metadata) = load(folder / model["weights"])[0], load(folder / case["trace"])
    for n, call in enumerate(json.loads(metadata["calls"])):
        tokens = given[f"call.{n}.tokens"]
        cache = None if call["after"] is None else caches[call["after"]]
        past, (rows, length) = cache[0][0].shape[2] if cache else 0, tokens.shape
        following = np.tile(np.arange(past, past + length), (rows, 1))
        positions = given.get(f"call.{n}.positions", following)
        mask = given.get(f"call.{n}.mask", np.tri(length, past + length, past, bool)[None])
        logits, new = forward(w, model["config"], tokens, positions, mask, cache)
        caches.append(new)
        real = case["real"][n] or [[0, length]] * rows
        pair = logits, given[f"call.{n}.logits"]
        a, e = (np.concatenate([x[b, i:j] for b, (i, j) in enumerate(real)]) for x in pair)
        error = np.abs(a - e).max() / np.abs(e).max()  # the measure
        yield error / case["bounds"][f"call.{n}.logits"][0]


def main(folder):
    index = json.loads((folder / "index.json").read_text())
    if index["schema_version"] != 1:
        sys.exit(f"schema version {index['schema_version']}, not 1")
    found = [
        (share, case["id"]) for case in index["cases"] for share in shares(folder, index, case)
    ]
    for share, name in found:
        if not share <= 1:
            print(f"FAILED {name}: {share} times its bound")
    share, name = max(found)
    print(f"{len(found)} calls, largest error {share} of its bound ({name})")
    return int(not all(share <= 1 for share, _ in found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
