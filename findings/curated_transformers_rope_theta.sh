#!/usr/bin/env bash
# curated-transformers 2.0.1 loads every Llama with a rotary base of 10000 and without rotary scaling,
# whatever config.json says, and says nothing: _config_from_hf in models/llama/_hf.py writes the number.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, transformers 5.23.0, Linux x86-64. Random
# Llamas saved by transformers, with rope_theta, rope_scaling and torch_dtype at the top level of
# config.json; 64 tokens; largest difference of the logits (largest: 6.8):
#                          from transformers'     from transformers' with base 10000, no scaling
#   base 10000             8e-6                   8e-6
#   base 500000            8.5                    8e-6
#   linear, factor 4       8.0                    8e-6
# Every Llama 3 (base 500000) runs as another model. Build LlamaConfig(rotary_embedding_base=...) and load
# the weights into LlamaCausalLM by state_dict_from_hf; scaling cannot be had.
#
# Run: bash findings/curated_transformers_rope_theta.sh [python]
# It installs curated-transformers and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    curated-transformers==2.0.1 transformers==5.23.0 torch==2.13.0 safetensors==0.8.0 requests==2.34.2 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from curated_transformers.layers import AttentionMask
from curated_transformers.models import LlamaCausalLM
from fsspec.implementations.local import LocalFileSystem
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100,
    "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
tokens = torch.randint(0, 100, (1, 64))


def llama(rope):
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)).eval()


plain = llama({"rope_theta": 10000.0, "rope_type": "default"})
for package in ("curated-transformers", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
same = True
for name, theta, scaling in (
    ("base 10000", 10000.0, None),
    ("base 500000", 500000.0, None),
    ("linear, factor 4", 10000.0, {"rope_type": "linear", "factor": 4.0}),
):
    model = llama({"rope_theta": theta, **(scaling or {"rope_type": "default"})})
    model.load_state_dict(plain.state_dict())
    folder = Path(sys.argv[1], name.replace(" ", "_"))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    curated = LlamaCausalLM.from_fsspec(fs=LocalFileSystem(), model_path=str(folder)).eval()
    with torch.no_grad():
        logits = curated(tokens, AttentionMask(torch.ones(1, 64, dtype=torch.bool))).logits
        wanted, other = model(tokens).logits, plain(tokens).logits
    errors = [(logits - one).abs().max().item() for one in (wanted, other)]
    print(f"{name}: {errors[0]:.1e}; {errors[1]:.1e}; largest logit {wanted.abs().max():.1f}")
    same &= errors[1] < 1e-4 and (errors[0] < 1e-4 if name == "base 10000" else errors[0] > 0.1)
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
