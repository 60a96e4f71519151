#!/usr/bin/env bash
# levanter 1.2.dev1644 loads a bfloat16 checkpoint in bfloat16, whatever dtype load_pretrained is given, and
# says nothing: read_safetensors_fsspec casts a tensor if np.issubdtype(dtype, np.floating), which is False of
# ml_dtypes' bfloat16. float16 and float32 files are cast. Most Llamas are stored in bfloat16: asked for
# float32, they are computed in bfloat16.
#
# Seen 2026-11-28 with Python 3.11, jax 0.10.2, haliax 1.4.dev453, transformers 4.57.6, torch 2.13.0 on the CPU,
# Linux x86-64. A random Llama, saved by transformers and loaded with dtype=jnp.float32; 40 tokens; largest
# difference of the logits from transformers' in float32 (largest: 6.5):
#                        of the model      difference
#   float32 file         float32           9e-6
#   float16 file         float32           9e-6
#   bfloat16 file        bfloat16          0.23
#   the last, cast after it was loaded     9e-6
# Cast the model after it is loaded: jax.tree.map(lambda x: x.astype(jnp.float32), model).
#
# Run: bash findings/levanter_bfloat16_dtype.sh [python]
# It installs levanter and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    levanter==1.2.dev1644 haliax==1.4.dev453 jax==0.10.2 equinox==0.13.8 transformers==4.57.6 \
    gitpython chex torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from levanter.compat.hf_checkpoints import HFCheckpointConverter
from levanter.layers.attention import AttentionMask
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
torch.manual_seed(0)
shape = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
llama = LlamaForCausalLM(HuggingFaceConfig(**shape)).eval()
with torch.no_grad():
    for weight in llama.parameters():
        weight.copy_(weight.bfloat16().half())  # numbers that all three hold
words = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"t{i}": i for i in range(100)}, "t0"))
)
tokens = np.random.default_rng(0).integers(0, 100, (1, 40))
with torch.no_grad():
    wanted = llama(torch.from_numpy(tokens)).logits.numpy()


def loaded(name):
    """Return the model that levanter makes in float32 of a file in a dtype."""
    path = f"{sys.argv[1]}/{name}"
    llama.to(getattr(torch, name)).save_pretrained(path)
    llama.float()
    converter = HFCheckpointConverter(LlamaConfig, path, HuggingFaceConfig, words)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        return converter.load_pretrained(LlamaLMHeadModel, dtype=jnp.float32)


def error(model):
    given = hax.named(jnp.asarray(tokens, jnp.int32), ("batch", "position"))
    logits = model(given, AttentionMask.causal()).rearrange(("batch", "position", "vocab"))
    return float(abs(np.array(logits.array.astype(jnp.float32)) - wanted).max())


for package in ("levanter", "haliax", "jax", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
print(f"largest logit {abs(wanted).max():.1f}")
found = {}
for name in ("float32", "float16", "bfloat16"):
    model = loaded(name)
    dtype = str(model.lm_head.weight.dtype)
    found[name] = dtype, error(model)
    print(f"  {name} file: {dtype}, largest difference from transformers' {found[name][1]:.1e}")
cast = error(jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, model))
print(f"  the last, cast after it was loaded: {cast:.1e}")
same = [found[name][0] for name in found] == ["float32", "float32", "bfloat16"]
same &= found["bfloat16"][1] > 1e-2 and max(found["float32"][1], found["float16"][1], cast) < 1e-3
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder"
