#!/usr/bin/env bash
# mlx-lm 0.32.2 reads a Llama's config.json of transformers 5 with a rotary base of 10000 and without
# rotary scaling, whatever the file says, and says nothing. Version 5 of transformers writes both in
# rope_parameters ({"rope_theta": ..., "rope_type": ...}); mlx-lm's llama reads rope_theta and
# rope_scaling at the top level alone, where transformers 4 wrote them.
#
# Seen 2026-11-28 with Python 3.11, mlx 0.32.4 on the CPU, transformers 5.24.0 (which mlx-lm requires),
# Linux x86-64. One set of weights in five directories; largest difference of the logits (largest
# logit: 6.4) from those of the directory with rope_theta 10000 at the top level:
#   top level:       rope_theta 500000                      7.9
#   top level:       rope_theta 10000, linear, factor 4     8.0
#   rope_parameters: rope_theta 500000, default             0
#   rope_parameters: rope_theta 10000, linear, factor 4     0
# Every Llama 3 that transformers 5 saved (base 500000) runs as another model. Copy rope_theta, and the
# rest as rope_scaling, to the top level of config.json.
#
# Run: bash findings/mlx_lm_rope_parameters.sh [python]
# It installs mlx-lm in a virtual environment in a temporary folder and writes the directories with
# NumPy and safetensors. Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0 safetensors==0.8.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import save_file

warnings.simplefilter("error")
mx.set_default_device(mx.cpu)
D, F, V, LAYERS = 64, 96, 100, 2
rng = np.random.default_rng(0)


def matrix(*shape):
    return rng.normal(0, 0.2, shape).astype(np.float32)


weights = {"model.embed_tokens.weight": matrix(V, D), "lm_head.weight": matrix(V, D)}
weights["model.norm.weight"] = np.ones(D, np.float32)
for i in range(LAYERS):
    at = f"model.layers.{i}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{at}{norm}.weight"] = np.ones(D, np.float32)
    for name in "qkvo":
        weights[f"{at}self_attn.{name}_proj.weight"] = matrix(D, D)
    for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        weights[f"{at}mlp.{name}_proj.weight"] = matrix(*shape)
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "vocab_size": V,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}
tokens = rng.integers(0, V, (1, 150))


def logits(name, **rope):
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **rope}))
    save_file(weights, folder / "model.safetensors")
    model, _ = load_model(folder)
    return np.array(model(mx.array(tokens)))


linear = {"rope_type": "linear", "factor": 4.0}
plain = logits("plain", rope_theta=10000.0)
found = {
    "top level: rope_theta 500000": logits("a", rope_theta=500000.0),
    "top level: linear, factor 4": logits("b", rope_theta=10000.0, rope_scaling=linear),
    "rope_parameters: rope_theta 500000": logits(
        "c", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}
    ),
    "rope_parameters: linear, factor 4": logits(
        "d", rope_parameters={"rope_theta": 10000.0, **linear}
    ),
}
for package in ("mlx-lm", "mlx", "transformers"):
    print(package, importlib.metadata.version(package))
same = True
print(f"largest logit {abs(plain).max():.1f}; largest difference from rope_theta 10000:")
for name, value in found.items():
    difference = abs(value - plain).max()
    print(f"  {name:36} {difference:.1f}")
    same &= difference > 0.1 if name.startswith("top") else difference == 0
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
