#!/usr/bin/env bash
# ibm-fms 1.13.1 computes wrong logits without a cache where the prompt has as many tokens as the model
# has key/value heads, and says nothing. Without a cache its attention gets keys and values as [batch,
# tokens, heads, width] and turns them to [batch, heads, tokens, width] unless the second size equals the
# number of key/value heads already (_sdpa_compute_op in fms/modules/attention.py): with as many tokens
# as heads it takes tokens for heads.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, transformers 5.23.0, Linux x86-64. A random
# Llama with 8 query heads and 4 key/value heads, saved by transformers and loaded by
# get_model("hf_pretrained"); largest difference of the logits (largest: 5) from transformers':
#   2, 3, 5, 6 tokens          3e-6
#   4 tokens                   7.0
#   4 tokens, use_cache=True   2e-6
# In a batch every row is wrong. Llama 3 8B has 8 such heads: prompts, or rows to be scored, of 8 tokens.
# With use_cache=True the logits are right.
#
# Run: bash findings/ibm_fms_prompt_of_kv_heads.sh [python]
# It installs ibm-fms and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ibm-fms==1.13.1 transformers==5.23.0 torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from fms.models import get_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=100,
    num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2,
)
reference = LlamaForCausalLM(config).eval()
reference.save_pretrained(sys.argv[1] + "/model")
model = get_model("hf_pretrained", model_path=sys.argv[1] + "/model", data_type="float32").eval()
for package in ("ibm-fms", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
same = True
with torch.no_grad():
    for length in (2, 3, 4, 5, 6):
        tokens = torch.randint(0, 100, (2, length))
        wanted = reference(tokens).logits
        error = (model(tokens) - wanted).abs().max().item()
        cached = (model(tokens, use_cache=True)[0] - wanted).abs().max().item()
        print(f"{length} tokens: {error:.1e} of {wanted.abs().max():.1f}", end="; ")
        print(f"use_cache=True: {cached:.1e}")
        same &= (error > 0.1 if length == 4 else error < 1e-4) and cached < 1e-4
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
