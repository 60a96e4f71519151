#!/usr/bin/env bash
# CTranslate2 4.8.5 converts a Llama whose head_dim is not hidden_size / num_attention_heads without a word.
# The converter of Llama does not read head_dim. With as many key/value heads as query heads the engine
# computes the heads at their true width, and divides the scores by the root of hidden_size /
# num_attention_heads; with fewer it stops at the first call.
#
# Seen 2026-11-28 with Python 3.11, transformers 5.23.0, torch 2.13.0, Linux x86-64. Random Llamas,
# hidden_size 64, 2 heads, 40 tokens, float32; largest difference of the logits (largest: 7)
#   head_dim   key/value heads   from transformers'   from transformers' with the scores of head_dim 32
#   32         2                 1e-5                 1e-5
#   48         2                 2                    1e-5
#   48         1                 ValueError: axis 2 has dimension 192 but expected 128
# Meta's Llamas have hidden_size / num_attention_heads and are right. Run others with transformers, or
# multiply the weights of q_proj by (hidden_size / num_attention_heads / head_dim) ** 0.5 before.
#
# Run: bash findings/ctranslate2_head_dim.sh [python]
# It installs CTranslate2, transformers and torch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ctranslate2==4.8.5 transformers==5.23.0 torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import sys

import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
V, D, HEADS = 100, 64, 2
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2"
)
tokens = np.random.default_rng(0).integers(3, V, (1, 40))


def model_of(head_dim, kv_heads):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=head_dim,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def converted(model, folder):
    """Return CTranslate2's logits of a model that is saved, converted and loaded."""
    model.save_pretrained(folder + "/saved")
    tokenizer.save_pretrained(folder + "/saved")
    TransformersConverter(folder + "/saved").convert(folder + "/converted")
    engine = ctranslate2.Generator(folder + "/converted", device="cpu", intra_threads=1)
    view, lengths = ctranslate2.StorageView.from_array, np.array([tokens.shape[1]], np.int32)
    return np.array(engine.forward_batch(view(tokens.astype(np.int32)), view(lengths)))


@torch.no_grad()
def logits_of(model, scaling=None):
    for layer in model.model.layers:
        layer.self_attn.scaling = scaling or layer.self_attn.scaling
    return model(torch.from_numpy(tokens)).logits.numpy()


print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
print("torch", torch.__version__)
same = True
for head_dim, kv_heads in ((32, 2), (48, 2), (48, 1)):
    model = model_of(head_dim, kv_heads)
    name = f"head_dim {head_dim}, {kv_heads} key/value heads"
    try:
        found = converted(model, f"{sys.argv[1]}/{head_dim}_{kv_heads}")
    except ValueError as error:
        print(f"{name}: ValueError: {error}")
        same &= kv_heads == 1
        continue
    wanted, other = logits_of(model), logits_of(model, (D / HEADS) ** -0.5)
    errors = abs(found - wanted).max(), abs(found - other).max()
    print(f"{name}: from transformers' {errors[0]:.0e}, with the other scores {errors[1]:.0e}", end="")
    print(f"; largest logit {abs(wanted).max():.1f}")
    same &= kv_heads == 2 and errors[1] < 1e-3
    same &= errors[0] < 1e-3 if head_dim == 32 else errors[0] > 0.1
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
