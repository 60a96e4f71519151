#!/usr/bin/env bash
# tinygrad 0.13.0 reads a Llama 3.1, 3.2 or 3.3 without its rotary scaling, and says nothing. A GGUF file
# has the scaling as the divisors of the frequencies, the tensor rope_freqs.weight; Transformer.from_gguf
# passes it by (a comment beside load_state_dict says that it is unused). tinygrad's own list of models
# has llama3.1:8b, llama3.2:1b and llama3.2:3b.
#
# Seen 2026-11-28 with Python 3.11, gguf 0.19.0, Linux x86-64. One layer, 48 tokens, base 500000, factor 8,
# an original context of 32, in float32; largest difference of the logits from a NumPy computation, of
# the largest logit:
#   rope_freqs.weight   with the scaling   without it
#   left out            1.7                1e-6
#   there               1.7                1e-6
# There is no option for it: divide the angles of each block's freqs_cis (precompute_freqs_cis) by the
# divisors before the first call. llama.cpp reads the tensor.
#
# Run: bash findings/tinygrad_rope_freqs.sh [python]
# It installs tinygrad and gguf in a virtual environment in a temporary folder; tinygrad's own assembler
# needs an x86-64 processor. Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    tinygrad==0.13.0 gguf==0.19.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ |= {"HALF": "0", "DEV": "CPU:X86"}  # float32; no compiler needed

import gguf
import numpy as np
from tinygrad import Tensor
from tinygrad.llm.model import Transformer

D, V, T, BASE, EPS = 32, 50, 48, 500000.0, 1e-5
rng = np.random.default_rng(0)
# Llama 3.1's scaling with an original context of 32, as convert_hf_to_gguf writes it: the divisors.
plain = BASE ** -(np.arange(0, D, 2) / D)
share = np.clip((32 * plain / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0, 1)
divisors = (1 / (share + (1 - share) / 8.0)).astype(np.float32)


def matrix(*shape):
    return rng.normal(0, 0.4, shape).astype(np.float32)


# One layer, one head; the feed-forward network is zero and every norm's weight 1.
own = {name: matrix(D, D) for name in "qkvo"}
embedding, head = matrix(V, D), matrix(V, D)
tokens = rng.integers(0, V, (1, T))


def loaded(divided):
    """tinygrad's logits of a GGUF file, with or without rope_freqs.weight."""
    file = Path(sys.argv[1], f"{divided}.gguf")
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(D)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(V)])
    if divided:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", head)
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(D, np.float32))
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((D, D), np.float32))
    for name, key in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        value = own[name]
        if name in "qk":  # a GGUF file has neighbouring pairs
            value = np.ascontiguousarray(value.reshape(2, D // 2, D).swapaxes(0, 1)).reshape(D, D)
        writer.add_tensor(f"blk.0.{key}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, _ = Transformer.from_gguf(file)
    x = model.token_embd(Tensor(tokens.astype(np.int32))).float()
    for block in model.blk:
        x = block(x, 0)
    return model.output(model.output_norm(x)).numpy()[0]


def exact(frequencies):
    def norm(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS)

    def rotated(x):
        angles = np.arange(T)[:, None] * frequencies
        cos, sin, a, b = np.cos(angles), np.sin(angles), x[:, : D // 2], x[:, D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    x = embedding[tokens[0]].astype(float)
    q, k, v = (norm(x) @ own[n].T for n in "qkv")
    scores = rotated(q) @ rotated(k).T / np.sqrt(D)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    x = x + weight / weight.sum(-1, keepdims=True) @ v @ own["o"].T
    return norm(x) @ head.T


for package in ("tinygrad", "gguf"):
    print(package, importlib.metadata.version(package))
same, size = True, abs(exact(plain)).max()
for divided in (False, True):
    found = loaded(divided)
    scaled, unscaled = (abs(found - exact(f)).max() / size for f in (plain / divisors, plain))
    print(f"rope_freqs.weight {'there' if divided else 'left out':8}:", end=" ")
    print(f"error with the scaling {scaled:.1e}, without it {unscaled:.1e}")
    same &= scaled > 1e-2 and unscaled < 1e-4
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
XDG_CACHE_HOME="$folder/cache" "$folder/venv/bin/python" "$folder/try.py" "$folder"
