#!/usr/bin/env bash
# ibm-fms 1.13.1 with transformers 5 loads a Llama 3.1 without its rotary scaling and says nothing.
# Version 5 of transformers holds it in config.rope_parameters ({"rope_theta": ..., "rope_type": "llama3",
# "factor": ...}), whichever version wrote the file; ibm-fms looks there for a key "rope_scaling"
# (reverse_rope_param_lookup in fms/models/hf/config_utils/param_builders.py), which is never there.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, transformers 5.23.0, Linux x86-64. A random
# Llama with llama3 scaling, factor 8 of 32 positions, saved by transformers and loaded by
# get_model("hf_pretrained"); 64 tokens; largest difference of the logits (largest: 5.8):
#   from transformers' with the scaling       6.3
#   from transformers' without it             7e-6
# Install transformers below 5, where config.rope_scaling is read.
#
# Run: bash findings/ibm_fms_llama3_scaling.sh [python]
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
scaling = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
shape = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100,
    "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
base = {"rope_theta": 500000.0}
scaled = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters={**base, **scaling})).eval()
plain = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters={**base, "rope_type": "default"})).eval()
plain.load_state_dict(scaled.state_dict())
scaled.save_pretrained(sys.argv[1] + "/model")
model = get_model("hf_pretrained", model_path=sys.argv[1] + "/model", data_type="float32").eval()
tokens = torch.randint(0, 100, (1, 64))
with torch.no_grad():
    logits, wanted, other = model(tokens), scaled(tokens).logits, plain(tokens).logits
for package in ("ibm-fms", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
errors = [(logits - one).abs().max().item() for one in (wanted, other)]
print(f"largest logit {wanted.abs().max():.1f}; largest difference from transformers'")
print(f"  with the scaling: {errors[0]:.1e}; without it: {errors[1]:.1e}")
same = errors[0] > 0.1 and errors[1] < 1e-4
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
