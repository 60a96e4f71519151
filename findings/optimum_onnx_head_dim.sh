#!/usr/bin/env bash
# ORTModelForCausalLM of optimum-onnx 0.1.0 exports a Llama whose head_dim is not hidden_size /
# num_attention_heads, and cannot run what it exported: it makes the empty cache of the first call with
# hidden_size / num_attention_heads numbers a head, which ONNX Runtime refuses ("Got invalid dimensions
# for input: past_key_values..."). Of config.json's head_dim it asks for Gemma alone.
#
# Seen 2026-11-28 with Python 3.11, optimum 2.1.0, transformers 4.57.6, onnxruntime 1.32.0, torch 2.13.0,
# Linux x86-64. A random Llama of hidden_size 64 and 2 heads, 12 tokens, float32; largest difference of
# the logits (largest logit: 5.3) from transformers':
#   head_dim   ORTModelForCausalLM   after model.embed_size_per_head = 48
#   32         5e-06                 -
#   48         InvalidArgument       6e-06
# Meta's Llamas have head_dim = hidden_size / num_attention_heads and are right. The others run after the
# assignment above, or with a cache that you make.
#
# Run: bash findings/optimum_onnx_head_dim.sh [python]
# It installs optimum-onnx, ONNX Runtime, transformers and PyTorch in a virtual environment in a
# temporary folder. Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    optimum-onnx==0.1.0 optimum==2.1.0 onnxruntime==1.32.0 onnx==1.23.2 transformers==4.57.6 \
    torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

for package in ("optimum-onnx", "onnxruntime", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
shape = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
}
tokens = torch.randint(0, 100, (1, 12), generator=torch.Generator().manual_seed(0))


def difference(model, exact):
    found = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    return (found - exact).abs().max().item()


same = True
for head_dim in (32, 48):
    torch.manual_seed(0)
    saved = f"{sys.argv[1]}/{head_dim}"
    llama = LlamaForCausalLM(LlamaConfig(**shape, head_dim=head_dim)).eval()
    llama.save_pretrained(saved)
    with torch.no_grad():
        exact = llama(tokens).logits
    model = ORTModelForCausalLM.from_pretrained(saved, export=True)
    try:
        error = difference(model, exact)
        print(f"head_dim {head_dim}: largest logit {exact.abs().max():.1f}, difference {error:.0e}")
        same &= head_dim == 32 and error < 1e-4
    except Exception as refused:
        same &= head_dim == 48 and "invalid dimensions for input: past_key_values" in str(refused)
        print(f"head_dim {head_dim}: {' '.join(str(refused).split())}")
        model.embed_size_per_head = head_dim
        error = difference(model, exact)
        print(f"  with embed_size_per_head = {head_dim}: difference {error:.0e}")
        same &= error < 1e-4
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
