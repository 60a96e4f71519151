#!/usr/bin/env bash
# ibm-fms 1.13.1 computes wrong logits where several tokens follow a cache and no mask is given, and says
# nothing. Without a mask its attention asks scaled_dot_product_attention for a causal one
# (_sdpa_compute_op in fms/modules/attention.py), which PyTorch aligns at the first key: the first of the
# new tokens sees the first token of the cache alone. One token at a time is right.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, transformers 5.23.0, Linux x86-64. A random
# Llama saved by transformers and loaded by get_model("hf_pretrained"); a prompt of 7 tokens, then 5 more;
# largest difference of the logits (largest: 6) from transformers':
#   the prompt                              3e-6
#   then one token                          3e-6
#   then five tokens                        7
#   then five tokens, with a mask           3e-6
# It concerns a prompt that is read in parts, and candidates of several tokens that are checked at once.
# generate(), which appends one token at a time, is right. Give mask, True where a token may attend:
# torch.ones(new, past + new).tril(past).bool()[None].
#
# Run: bash findings/ibm_fms_cached_tokens.sh [python]
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
past, new = 7, 5
tokens = torch.randint(0, 100, (2, past + new))
with torch.no_grad():
    wanted = reference(tokens).logits
    prompt, cache = model(tokens[:, :past], use_cache=True)
    given = {"past_key_value_states": cache, "use_cache": True}
    mask = torch.ones(new, past + new).tril(past).bool()[None]
    found = {
        "the prompt": (prompt, wanted[:, :past]),
        "one token": (model(tokens[:, past : past + 1], **given)[0], wanted[:, past : past + 1]),
        "five tokens": (model(tokens[:, past:], **given)[0], wanted[:, past:]),
        "five tokens, mask": (model(tokens[:, past:], mask=mask, **given)[0], wanted[:, past:]),
    }
print(f"largest logit {wanted.abs().max():.1f}; largest difference from transformers'")
same = True
for name, (logits, right) in found.items():
    error = (logits - right).abs().max().item()
    print(f"  {name:18} {error:.1e}")
    same &= error > 0.1 if name == "five tokens" else error < 1e-4
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
