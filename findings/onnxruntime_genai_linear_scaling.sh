#!/usr/bin/env bash
# The model builder of ONNX Runtime GenAI 0.18.0 builds a Llama with linear rotary scaling, or with YaRN's,
# as one without, and says nothing. Its base class has both (make_rope_init); the class of Llama replaces
# that method by one that knows "llama3" alone, so that the factor stays 1.
#
# Seen 2026-11-28 with Python 3.11, onnxruntime 1.32.0, transformers 5.23.0, torch 2.13.0, Linux x86-64.
# One set of weights, 150 tokens, in float32; largest difference of the logits (largest logit: 7):
#   rope_scaling          from transformers   from transformers without scaling
#   none                  2e-05               2e-05
#   llama3, factor 8      1e-05               9
#   linear, factor 4      8                   2e-05
#   yarn, factor 4        8                   2e-05
# It concerns Llama 1 and 2 whose context was extended by position interpolation (LongChat, Vicuna with
# 16k) or by YaRN. There is no option for it: divide the frequencies in the graph's cos_cache and sin_cache.
#
# Run: bash findings/onnxruntime_genai_linear_scaling.sh [python]
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

D, F, V, T = 64, 96, 100, 150
rng = np.random.default_rng(0)


def matrix(*shape):
    return rng.normal(0, 0.2, shape).astype(np.float32)


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
tokens = rng.integers(0, V, (1, T))


def both(name, scaling):
    """The logits of transformers and of ONNX Runtime GenAI."""
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(tokens)).logits.numpy()
    out = Path(sys.argv[1], f"{name}_onnx")
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
        + ["-o", str(out), "-p", "fp32", "-e", "cpu", "-c", sys.argv[1]],
        check=True, capture_output=True,
    )
    model = og.Model(str(out))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(tokens.astype(np.int32))
    return exact, np.array(generator.get_output("logits"))


for package in ("onnxruntime-genai", "onnxruntime", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
llama3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
plain, same = both("none", None)[0], True
for name, scaling in (
    ("none", None), ("llama3", llama3), ("linear", {"rope_type": "linear", "factor": 4.0}),
    ("yarn", yarn),
):
    exact, found = both(f"try_{name}", scaling)
    error, unscaled = abs(found - exact).max(), abs(found - plain).max()
    print(f"rope_scaling {name:6}: largest logit {abs(exact).max():.1f}; largest difference from", end=" ")
    print(f"transformers {error:.0e}, from transformers without scaling {unscaled:.0e}")
    same &= error > 0.1 and unscaled < 1e-3 if name in ("linear", "yarn") else error < 1e-3
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
