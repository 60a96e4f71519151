#!/usr/bin/env bash
# curated-transformers 2.0.1 in bfloat16 or float16 computes wrong logits for prompts of more than 512
# tokens. The tables of the rotation are made for 512 positions, in float32, and rounded with the model;
# for more they are made again from frequencies that are bfloat16 or float16 by now (RotaryEmbeddings in
# layers/embeddings.py), and the angles, products with the position, are so as well.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, transformers 5.23.0, Linux x86-64. A random
# Llama of two layers; root mean square error of the logits, as a share of theirs, from transformers' in
# float32, by curated-transformers and by transformers in the same precision:
#   float32,  512 and 513 tokens     1e-6   1e-6        0       0
#   bfloat16, 512 and 513 tokens     0.016  0.18        0.024   0.027
#   float16,  512 and 513 tokens     0.0018 0.013       0.0070  0.0069
# The first tokens of a prompt are wrong too. Llama 2 takes 4096 tokens. Make the tables long enough in
# float32 before: QueryKeyRotaryEmbeddings.rotary_embeds._create_rotary_embed(width=..., length=4096).
#
# Run: bash findings/curated_transformers_513_tokens.sh [python]
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
import sys

import torch
from curated_transformers.layers import Activation, AttentionMask
from curated_transformers.models import LlamaCausalLM
from curated_transformers.models import LlamaConfig as CuratedConfig
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=96, num_hidden_layers=2, vocab_size=100,
    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.1,
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
)
reference = LlamaForCausalLM(config).eval()
weights = {name: value.clone() for name, value in reference.state_dict().items()}
curated_config = CuratedConfig(
    activation=Activation.SiLU, hidden_width=128, intermediate_width=96, rms_norm_eps=1e-6,
    n_query_heads=2, n_hidden_layers=2, n_key_value_heads=2, rotary_embedding_base=10000,
    rotary_embedding_fraction=1.0, n_pieces=100,
)


def share(logits, wanted):
    return ((logits.float() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


for package in ("curated-transformers", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
same, found = True, {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    curated = LlamaCausalLM(curated_config).eval()
    curated.load_state_dict(LlamaCausalLM.state_dict_from_hf(weights))
    curated.to(dtype)
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(weights)
    other.to(dtype)
    for length in (512, 513):
        tokens = torch.randint(0, 100, (1, length))
        with torch.no_grad():
            wanted = reference(tokens).logits
            logits = curated(tokens, AttentionMask(torch.ones(1, length, dtype=torch.bool))).logits
            errors = share(logits, wanted), share(other(tokens).logits, wanted)
        print(f"{dtype}, {length} tokens: {errors[0]:.1e}; transformers {errors[1]:.1e}")
        found[dtype, length] = errors[0]
    grows = found[dtype, 513] > 4 * found[dtype, 512]
    same &= grows == (dtype != torch.float32)
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
