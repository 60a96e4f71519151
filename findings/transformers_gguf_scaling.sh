#!/usr/bin/env bash
# transformers 5.23.0 reads a GGUF file of a Llama with rotary scaling (from_pretrained(..., gguf_file=...)) as a
# model without it and says nothing: neither the keys rope.scaling.type and rope.scaling.factor of linear scaling
# nor the divisors of the frequencies, rope_freqs.weight, which stand for that of Llama 3.1 and later, are read.
#
# Seen 2026-11-28 with Python 3.11, torch 2.13.0 on the CPU, gguf 0.19.0, accelerate 1.15.0, Linux x86-64. A random
# Llama, its file written by gguf as llama.cpp's converter does; 64 tokens; largest difference of the logits
# (largest: 7.1) of the model that is read
#   scaling   from transformers' with it    from transformers' without it
#   none      0                             0
#   linear    8                             0
#   llama3    9                             0
# Load the model's Hugging Face directory instead.
#
# Run: bash findings/transformers_gguf_scaling.sh [python]
# It installs transformers, gguf and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 gguf==0.19.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

torch.set_num_threads(1)
torch.manual_seed(0)
disable_progress_bar()
place = Path(sys.argv[1])
HEADS, KV, D, V = 2, 1, 64, 100
base = {"rope_theta": 500000.0}
kinds = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
names = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}


def with_scaling(scaling):
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=D, intermediate_size=96, num_hidden_layers=2, vocab_size=V,
            num_attention_heads=HEADS, num_key_value_heads=KV, initializer_range=0.2,
            max_position_embeddings=256, rope_parameters={**base, **scaling},
        )
    ).eval()


plain = with_scaling({"rope_type": "default"})
tokens = torch.randint(0, V, (1, 64))


def write(path, kind, divisors):
    """Write plain's weights as llama.cpp's converter does, q and k in pairs, with a kind's scaling."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(256)
    file.add_embedding_length(D)
    file.add_block_count(2)
    file.add_feed_forward_length(96)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV)
    file.add_rope_dimension_count(D // HEADS)
    file.add_rope_freq_base(base["rope_theta"])
    file.add_layer_norm_rms_eps(plain.config.rms_norm_eps)
    file.add_vocab_size(V)
    if kind == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(4.0)
    if kind == "llama3":
        file.add_tensor("rope_freqs.weight", divisors)
    for name, value in plain.state_dict().items():
        stem, value = name.removesuffix(".weight"), value.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV)):
            if stem.endswith(part):
                pairs = value.reshape(heads, 2, -1, D).swapaxes(1, 2).reshape(value.shape)
                value = np.ascontiguousarray(pairs)
        layer = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
        file.add_tensor(f"{layer}{names[stem.split('.', 3)[3] if layer else stem]}.weight", value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@torch.no_grad()
def logits(model):
    return model(tokens).logits


for package in ("transformers", "gguf", "torch"):
    print(package, importlib.metadata.version(package))
print(f"largest logit {logits(plain).abs().max():.1f}; largest difference of the logits of the file's model")
same = True
for kind in ("none", "linear", "llama3"):
    wanted = with_scaling(kinds.get(kind, {"rope_type": "default"}))
    wanted.load_state_dict(plain.state_dict())
    divisors = (plain.model.rotary_emb.inv_freq / wanted.model.rotary_emb.inv_freq).numpy()
    write(place / f"{kind}.gguf", kind, divisors)
    read = LlamaForCausalLM.from_pretrained(place, gguf_file=f"{kind}.gguf", dtype=torch.float32).eval()
    scaled, unscaled = ((logits(read) - logits(one)).abs().max().item() for one in (wanted, plain))
    print(f"  scaling {kind:7} from the model with it {scaled:.0e}, from the one without {unscaled:.0e}")
    same &= unscaled < 1e-4 and (scaled > 0.1 or kind == "none")
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
