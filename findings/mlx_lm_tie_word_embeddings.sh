#!/usr/bin/env bash
# Where a Llama's config.json leaves tie_word_embeddings out, mlx-lm 0.32.2 takes the embedding for the
# head and drops the file's lm_head.weight; to transformers the key left out is false, so that its model has
# the head of the file. Neither says a word.
#
# Seen 2026-11-28 with Python 3.11, mlx 0.32.4 on the CPU, transformers 5.24.0, Linux x86-64. One set
# of weights with an lm_head.weight:
#   tie_word_embeddings   transformers' LlamaConfig   mlx-lm's logits
#   false                 false                       of lm_head.weight
#   true                  true                        of the embedding
#   left out              false                       of the embedding
# save_pretrained always writes the key, a config.json written by hand or by another program need not:
# write it out.
#
# Run: bash findings/mlx_lm_tie_word_embeddings.sh [python]
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
from transformers import LlamaConfig

warnings.simplefilter("error")
mx.set_default_device(mx.cpu)
D, V = 16, 50
rng = np.random.default_rng(0)
# One layer of which every matrix is zero: the logits are head @ (normalized embedding).
shapes = {f"self_attn.{name}_proj": (D, D) for name in "qkvo"}
shapes |= {"mlp.gate_proj": (D, D), "mlp.up_proj": (D, D), "mlp.down_proj": (D, D)}
weights = {f"model.layers.0.{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}
for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
    weights[f"model.{norm}.weight"] = np.ones(D, np.float32)
embedding, head = rng.normal(size=(2, V, D)).astype(np.float32)
weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": D, "intermediate_size": D, "num_hidden_layers": 1, "vocab_size": V,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}
tokens = np.arange(V)
x = embedding[tokens]
x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
wanted = {"of lm_head.weight": x @ head.T, "of the embedding": x @ embedding.T}
for package in ("mlx-lm", "mlx", "transformers"):
    print(package, importlib.metadata.version(package))
found = []
for name, key in (
    ("false", {"tie_word_embeddings": False}),
    ("true", {"tie_word_embeddings": True}),
    ("left out", {}),
):
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **key}))
    save_file(weights, folder / "model.safetensors")
    model, _ = load_model(folder)
    logits = np.array(model(mx.array(tokens[None])))[0]
    [whose] = [k for k, v in wanted.items() if np.allclose(logits, v, atol=1e-3)] or ["neither"]
    tied = LlamaConfig.from_pretrained(folder).tie_word_embeddings
    print(f"{name}: transformers {tied}, mlx-lm's logits are {whose}")
    found.append((tied, whose))
head, embedding = wanted
same = found == [(False, head), (True, embedding), (False, embedding)]
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
