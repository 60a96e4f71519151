#!/usr/bin/env bash
# keras-hub 0.32.0 loads a Llama 3.1, 3.2 or 3.3 whose config.json was written by transformers 5 without
# its rotary scaling, and says nothing. Version 5 writes base and scaling in rope_parameters
# ({"rope_theta": ..., "rope_type": "llama3", "factor": ...}); of these keras-hub reads rope_theta alone.
# The scaling is read from rope_scaling, where transformers 4 wrote it.
#
# Seen 2026-11-28 with Python 3.11, keras 3.15.1, JAX 0.10.2, Linux x86-64. One set of weights in three
# directories with base 500000:
#   config.json                             rope_frequency_adjustment_factor   error
#   transformers 4: rope_scaling llama3     8.0                                4e-7
#   transformers 5: rope_parameters llama3  None                               1.4
#   transformers 5: rope_parameters default None                               1.4
# (error: largest difference of the logits from a NumPy computation with the scaling, of the largest
# logit; the last two directories have the same logits to the bit). Copy the scaling to a key
# rope_scaling of config.json, or pass it: Backbone.from_preset(path,
# rope_frequency_adjustment_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
# rope_pretraining_sequence_length=8192).
#
# Run: bash findings/keras_hub_rope_parameters.sh [python]
# It installs keras-hub and JAX in a virtual environment in a temporary folder and writes the
# directories with NumPy and safetensors. Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    keras-hub==0.32.0 keras==3.15.1 jax==0.10.2 safetensors==0.8.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
from keras_hub.models import Backbone
from safetensors.numpy import save_file

D, V, T, BASE = 16, 50, 48, 500000.0
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
rng = np.random.default_rng(0)


def matrix(*shape, scale=0.5):
    return rng.normal(0, scale, shape).astype(np.float32)


# One layer, one head; the feed-forward network is zero and every norm's weight 1.
own = {name: matrix(D, D) for name in "qkvo"}
weights = {f"model.layers.0.self_attn.{n}_proj.weight": w for n, w in own.items()}
weights |= {f"model.layers.0.mlp.{n}_proj.weight": np.zeros((D, D), np.float32)
            for n in ("gate", "up", "down")}
for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
    weights[f"model.{norm}.weight"] = np.ones(D, np.float32)
weights |= {"model.embed_tokens.weight": matrix(V, D), "lm_head.weight": matrix(V, D)}
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "vocab_size": V,
    "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}
tokens = rng.integers(0, V, (1, T))


def load(name, **rope):
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **rope}))
    save_file(weights, folder / "model.safetensors")
    model = Backbone.from_preset(str(folder))
    hidden = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    return model, np.array(model.token_embedding(hidden, reverse=True))[0]


def frequencies():
    """The rotary frequencies of Llama 3.1, as its reference code scales them."""
    plain = BASE ** -(np.arange(0, D, 2) / D)
    turns = SCALING["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = SCALING["low_freq_factor"], SCALING["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (share + (1 - share) / SCALING["factor"])


def exact():
    def norm(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config["rms_norm_eps"])

    def rotated(x):
        angles = np.arange(T)[:, None] * frequencies()
        cos, sin, a, b = np.cos(angles), np.sin(angles), x[:, : D // 2], x[:, D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    x = weights["model.embed_tokens.weight"][tokens[0]].astype(float)
    q, k, v = (norm(x) @ own[n].T for n in "qkv")
    scores = rotated(q) @ rotated(k).T / np.sqrt(D)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    x = x + share / share.sum(-1, keepdims=True) @ v @ own["o"].T
    return norm(x) @ weights["lm_head.weight"].T


for package in ("keras-hub", "keras", "jax"):
    print(package, importlib.metadata.version(package))
right, found = exact(), {}
for name, rope in {
    "rope_scaling llama3": {"rope_theta": BASE, "rope_scaling": SCALING},
    "rope_parameters llama3": {"rope_parameters": {"rope_theta": BASE, **SCALING}},
    "rope_parameters default": {"rope_parameters": {"rope_theta": BASE, "rope_type": "default"}},
}.items():
    model, logits = found[name] = load(name.replace(" ", "_"), **rope)
    error = abs(logits - right).max() / abs(right).max()
    print(f"{name:24} rope_frequency_adjustment_factor", end=" ")
    print(f"{model.rope_frequency_adjustment_factor}, error {error:.1e}")
    found[name] = error, logits
(old, _), (new, scaled), (_, plain) = found.values()
same = old < 1e-4 and new > 1e-2 and bool((scaled == plain).all())
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
KERAS_BACKEND=jax JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 \
    "$folder/venv/bin/python" "$folder/try.py" "$folder"
