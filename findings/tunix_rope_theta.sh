#!/usr/bin/env bash
# google-tunix 0.1.7 rotates every Llama with the base 1,000,000, whatever ModelConfig.rope_theta says:
# Attention in tunix/models/llama3/model.py calls apply_rope without it, whose default that is. Every Llama 3
# (500,000) is computed, trained and sampled as another model, and nothing is said.
#
# Seen 2026-11-28 with Python 3.11, jax 0.10.2, flax 0.12.8, transformers 5.12.1, torch 2.13.0 on the CPU,
# Linux x86-64. A random Llama with base 500,000, saved by transformers and loaded by
# create_model_from_safe_tensors with rope_theta=500000; 200 tokens; largest difference of the logits
# (largest: 6.4):
#   from transformers' with base 500,000      7.1
#   from transformers' with base 1,000,000    2e-5
# Until it is mended put the base in before a model is made, for one base per process:
# model.apply_rope = functools.partial(model.apply_rope, rope_theta=500_000).
#
# Run: bash findings/tunix_rope_theta.sh [python]
# It installs google-tunix and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    google-tunix==0.1.7 jax==0.10.2 flax==0.12.8 transformers==5.12.1 torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tunix.models.llama3 import model, params

torch.set_num_threads(1)
torch.manual_seed(0)
shape = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5,
    "initializer_range": 0.2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}
half, whole = (
    LlamaForCausalLM(
        LlamaConfig(**shape, rope_parameters={"rope_theta": base, "rope_type": "default"})
    ).eval()
    for base in (500000.0, 1000000.0)
)
whole.load_state_dict(half.state_dict())
half.save_pretrained(sys.argv[1] + "/model")
config = model.ModelConfig(
    num_layers=2, vocab_size=100, embed_dim=64, hidden_dim=96, num_heads=2, head_dim=32,
    num_kv_heads=1, rope_theta=500000, norm_eps=1e-5,
)
tokens = torch.randint(0, 100, (1, 200))
length = tokens.shape[1]
positions, mask = np.arange(length)[None], np.tril(np.ones((1, length, length), bool))


def of_tunix():
    llama = params.create_model_from_safe_tensors(sys.argv[1] + "/model", config)
    return np.array(llama(tokens.numpy(), positions, None, mask)[0])


with torch.no_grad():
    wanted, other = half(tokens).logits.numpy(), whole(tokens).logits.numpy()
found = of_tunix()
rotate = model.apply_rope
model.apply_rope = lambda x, positions, head_dim: rotate(x, positions, head_dim, config.rope_theta)
mended = of_tunix()
for package in ("google-tunix", "jax", "flax", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
errors = [abs(one - two).max() for one, two in ((found, wanted), (found, other), (mended, wanted))]
print(f"largest logit {abs(wanted).max():.1f}; largest difference from transformers'")
print(f"  with base 500,000: {errors[0]:.1e}; with base 1,000,000: {errors[1]:.1e}")
print(f"  with base 500,000, the base given to apply_rope: {errors[2]:.1e}")
same = errors[0] > 0.1 and max(errors[1:]) < 1e-3
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder"
