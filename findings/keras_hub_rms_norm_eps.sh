#!/usr/bin/env bash
# keras-hub 0.32.0 does not read rms_norm_eps from a Llama's config.json: Backbone.from_preset of a
# Hugging Face directory gives a model with layer_norm_epsilon 1e-6, whatever the file says, and says
# nothing.
#
# Seen 2026-11-28 with Python 3.11, keras 3.15.1, JAX 0.10.2, Linux x86-64. One set of weights in
# directories with three values of rms_norm_eps, a NumPy computation with the file's value beside:
#   rms_norm_eps   layer_norm_epsilon   error with the file's value   with 1e-6
#   1e-6           1e-6                 2e-7                          2e-7
#   1e-5           1e-6                 2.2e-2                        2e-7
#   1e-3           1e-6                 8.6e-1                        2e-7
# (largest difference of the logits, of the largest logit). Llama 2 and 3 have 1e-5, the first Llama
# 1e-6: the smaller the hidden state, the larger the error. Pass it: Backbone.from_preset(
# path, layer_norm_epsilon=1e-5) computes with 1e-5.
#
# Run: bash findings/keras_hub_rms_norm_eps.sh [python]
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

D, V = 16, 50
rng = np.random.default_rng(0)
# One layer of which every matrix is zero: the logits are head @ (normalized embedding).
shapes = {f"self_attn.{name}_proj": (D, D) for name in "qkvo"}
shapes |= {"mlp.gate_proj": (D, D), "mlp.up_proj": (D, D), "mlp.down_proj": (D, D)}
weights = {f"model.layers.0.{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}
for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
    weights[f"model.{norm}.weight"] = np.ones(D, np.float32)
embedding = rng.normal(0, 0.02, (V, D)).astype(np.float32)  # 0.02: as models are initialized
head = rng.normal(size=(V, D)).astype(np.float32)
weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "vocab_size": V,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}
tokens = np.arange(V)[None]


def load(eps, **given):
    folder = Path(sys.argv[1], str(eps))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": eps}))
    save_file(weights, folder / "model.safetensors")
    return Backbone.from_preset(str(folder), **given)


def error(model, eps):
    hidden = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    found = np.array(model.token_embedding(hidden, reverse=True))[0]
    x = embedding[tokens[0]]
    exact = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) @ head.T
    return abs(found - exact).max() / abs(exact).max()


for package in ("keras-hub", "keras", "jax"):
    print(package, importlib.metadata.version(package))
same = True
for eps in (1e-6, 1e-5, 1e-3):
    model = load(eps)
    of_file, of_default = error(model, eps), error(model, 1e-6)
    print(f"rms_norm_eps {eps:.0e}: layer_norm_epsilon {model.layer_norm_epsilon:.0e}", end="; ")
    print(f"error with the file's value {of_file:.1e}, with 1e-6 {of_default:.1e}")
    same &= model.layer_norm_epsilon == 1e-6 and of_default < 1e-5
    same &= of_file < 1e-5 if eps == 1e-6 else of_file > 1e-3
given = error(load(1e-5, layer_norm_epsilon=1e-5), 1e-5)
print(f"rms_norm_eps 1e-05, layer_norm_epsilon=1e-5 given: error with the file's value {given:.1e}")
same &= given < 1e-5
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
KERAS_BACKEND=jax JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 \
    "$folder/venv/bin/python" "$folder/try.py" "$folder"
