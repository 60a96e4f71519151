#!/usr/bin/env bash
# Three loaders compute a Llama whose config.json says hidden_act "gelu" with SiLU, and say nothing:
# CTranslate2 4.8.5 (its converter of transformers' models writes Activation.SWISH for every Llama),
# ibm-fms 1.13.1 (build_llama_params passes no activation_fn) and mlx-lm 0.32.2 (its MLP is swiglu).
# transformers computes what hidden_act says.
#
# Seen 2026-11-28 with Python 3.11, transformers 5.24.0, torch 2.13.0, mlx 0.32.4 on the CPU, Linux x86-64.
# A random Llama with GELU, saved by transformers; 40 tokens, float32; largest difference of the logits
# (largest logit: 8.0) from transformers'
#                 with GELU   with SiLU
#   ctranslate2   1.3         5e-5
#   ibm-fms       1.3         2e-5
#   mlx-lm        1.3         4e-5
# Meta's Llamas have SiLU and are right. Before you load another model of model_type "llama" with one of
# these, look for "hidden_act": "silu"; else run it with transformers.
#
# Run: bash findings/llama_loaders_hidden_act.sh [python]
# It installs the three, transformers and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ctranslate2==4.8.5 ibm-fms==1.13.1 mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0 \
    torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys
from pathlib import Path

import ctranslate2
import mlx.core as mx
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from fms.models import get_model
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
mx.set_default_device(mx.cpu)
V = 100
saved = Path(sys.argv[1], "saved")
shape = {
    "vocab_size": V, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
torch.manual_seed(0)
gelu = LlamaForCausalLM(LlamaConfig(**shape, hidden_act="gelu")).eval()
silu = LlamaForCausalLM(LlamaConfig(**shape, hidden_act="silu")).eval()
silu.load_state_dict(gelu.state_dict())
gelu.save_pretrained(saved)
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2"
).save_pretrained(saved)
tokens = np.random.default_rng(0).integers(3, V, (1, 40))


@torch.no_grad()
def of_transformers(model):
    return model(torch.from_numpy(tokens)).logits.numpy()


def of_ctranslate2():
    TransformersConverter(str(saved)).convert(sys.argv[1] + "/converted")
    engine = ctranslate2.Generator(sys.argv[1] + "/converted", device="cpu", intra_threads=1)
    view = ctranslate2.StorageView.from_array
    lengths = np.array([tokens.shape[1]], np.int32)
    return np.array(engine.forward_batch(view(tokens.astype(np.int32)), view(lengths)))


@torch.no_grad()
def of_fms():
    model = get_model("hf_pretrained", model_path=str(saved), data_type="float32").eval()
    return model(torch.from_numpy(tokens)).numpy()


def of_mlx():
    model, _ = load_model(saved)
    return np.array(model(mx.array(tokens)))


with_gelu, with_silu = of_transformers(gelu), of_transformers(silu)
for package in ("transformers", "torch", "mlx"):
    print(package, importlib.metadata.version(package))
print(f"largest logit {abs(with_gelu).max():.1f}; largest difference from transformers'")
same = abs(with_gelu - with_silu).max() > 0.1
for package, logits in (("ctranslate2", of_ctranslate2), ("ibm-fms", of_fms), ("mlx-lm", of_mlx)):
    found = logits()
    errors = [abs(found - one).max() for one in (with_gelu, with_silu)]
    name = f"{package} {importlib.metadata.version(package)}"
    print(f"  {name:18} with GELU {errors[0]:.1e}, with SiLU {errors[1]:.1e}")
    same &= errors[0] > 0.1 and errors[1] < 1e-3
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
