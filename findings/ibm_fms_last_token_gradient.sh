#!/usr/bin/env bash
# ibm-fms 1.13.1's Llama never trains the embedding of the last token of its vocabulary. LLaMAConfig has
# pad_id = -1, and gives it to torch.nn.Embedding as padding_idx, which takes it for the last row and
# gives that row no gradient. Loading from Hugging Face's form does not set pad_id.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, transformers 5.23.0, Linux x86-64. A random
# Llama saved by transformers and loaded by get_model("hf_pretrained"); the gradient of the embedding of
# each token that occurs, its norm, by transformers and by ibm-fms:
#   tokens 0, 1, 2      4.15, 2.07, 1.69: the same to 2e-6
#   token 99 of 100     1.67 and 0
# The token added last for a fine-tuning keeps the embedding it began with. Set pad_id in the model's
# config, or model.base_model.embedding.padding_idx = None after loading.
#
# Run: bash findings/ibm_fms_last_token_gradient.sh [python]
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
    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
)
reference = LlamaForCausalLM(config)
reference.save_pretrained(sys.argv[1] + "/model")
model = get_model("hf_pretrained", model_path=sys.argv[1] + "/model", data_type="float32")
tokens, targets = torch.tensor([[0, 1, 99, 2, 99, 1]]), torch.tensor([[1, 99, 2, 99, 1, 0]])


def gradient(logits, embedding):
    torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
    return embedding.weight.grad


wanted = gradient(reference(tokens).logits, reference.model.embed_tokens)
found = gradient(model(tokens), model.base_model.embedding)
for package in ("ibm-fms", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
print("padding_idx of ibm-fms' embedding:", model.base_model.embedding.padding_idx)
same = True
for token in (0, 1, 2, 99):
    norms = wanted[token].norm().item(), found[token].norm().item()
    difference = (wanted[token] - found[token]).abs().max().item()
    print(f"token {token}: gradient's norm {norms[0]:.2f} and {norms[1]:.2f};", end=" ")
    print(f"largest difference {difference:.1e}")
    same &= (norms[0] > 0.01 and norms[1] == 0) if token == 99 else difference < 1e-5
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
