#!/usr/bin/env bash
# The model builder of ONNX Runtime GenAI 0.18.0 builds a wrong graph of a Llama one of whose matrices has
# as many rows as the vocabulary, and says nothing. It walks over all modules of the model and takes each
# Linear whose out_features is vocab_size for the LM head (has_lm_head in builders/base.py): gate_proj
# and up_proj where intermediate_size is vocab_size, q, k, v and o where hidden_size is.
#
# Seen 2026-11-28 with Python 3.11, onnxruntime 1.32.0, transformers 5.23.0, torch 2.13.0, Linux x86-64.
# intermediate_size 256, 20 tokens, in float32:
#   vocab_size   LM heads read   largest logit   largest difference from transformers
#   255          1               5.7             6e-06
#   256          5               6.4             8
#   257          1               7.3             7e-06
# It concerns small models on bytes or characters, and tests with such. Make vocab_size another number, by
# rows of padding in embedding and head.
#
# Run: bash findings/onnxruntime_genai_vocab_size.sh [python]
# It installs ONNX Runtime GenAI, and transformers and PyTorch, which its builder needs, in a virtual
# environment in a temporary folder. Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    onnxruntime-genai==0.18.0 onnxruntime==1.32.0 transformers==5.23.0 torch==2.13.0 \
    onnx==1.23.2 onnx-ir==1.1.0 safetensors==0.8.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

D, F, T = 64, 256, 20
rng = np.random.default_rng(0)


def matrix(*shape):
    return rng.normal(0, 0.2, shape).astype(np.float32)

def model_of(V):
    """Weights, config.json and tokenizer.json with a vocabulary of V."""
    weights = {"model.embed_tokens.weight": matrix(V, D), "lm_head.weight": matrix(V, D)}
    weights["model.norm.weight"] = np.ones(D, np.float32)
    for i in range(2):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{norm}.weight"] = np.ones(D, np.float32)
        for name in "qkvo":
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix(D, D)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            weights[f"{at}mlp.{name}_proj.weight"] = matrix(*shape)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "vocab_size": V,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2,
    }
    words = {f"w{i}": i for i in range(V)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    return weights, config, tokenizer


def both(V):
    """The logits of transformers and of ONNX Runtime GenAI."""
    weights, config, tokenizer = model_of(V)
    folder = Path(sys.argv[1], str(V))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(tokens)).logits.numpy()
    out = Path(sys.argv[1], f"{V}_onnx")
    done = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
        + ["-o", str(out), "-p", "fp32", "-e", "cpu", "-c", sys.argv[1]],
        check=True, capture_output=True, text=True,
    )
    model = og.Model(str(out))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(tokens.astype(np.int32))
    return exact, np.array(generator.get_output("logits")), done.stdout.count("Reading LM head")


for package in ("onnxruntime-genai", "onnxruntime", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
tokens, same = rng.integers(0, 250, (1, T)), True
for V in (255, 256, 257):
    exact, found, heads = both(V)
    error = abs(found - exact).max()
    print(f"vocab_size {V}, intermediate_size {F}: largest logit {abs(exact).max():.1f}", end=", ")
    print(f"largest difference from transformers {error:.0e}; LM heads read: {heads}")
    same &= error > 0.1 if V == F else error < 1e-3
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
