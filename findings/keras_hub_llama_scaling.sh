#!/usr/bin/env bash
# keras-hub 0.32.0's linear rotary scaling of Llama does nothing: LlamaRotaryEmbedding(
# position_scaling_factor=f) and LlamaBackbone(rope_position_scaling_factor=f) are the same for every f.
# Their parent RotaryEmbedding divides by its scaling_factor in _get_inverse_freq, which
# LlamaRotaryEmbedding replaces by a method without the division.
#
# Seen 2026-11-28 with Python 3.11, keras 3.15.1, JAX 0.10.2, Linux x86-64; largest difference from
# the rotation in NumPy, positions divided by 4:
#   RotaryEmbedding(scaling_factor=4)                   2e-7
#   LlamaRotaryEmbedding(position_scaling_factor=4)     3.6
#   the same, from the rotation without a factor        3e-7
# and LlamaBackbone with factors 1 and 8, the same weights: hidden states equal to the bit.
# A model that was trained with linear scaling is computed without it, and no error tells it.
#
# Run: bash findings/keras_hub_llama_scaling.sh [python]
# It installs keras-hub and JAX in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    keras-hub==0.32.0 keras==3.15.1 jax==0.10.2 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
from keras_hub.layers import RotaryEmbedding
from keras_hub.models import LlamaBackbone
from keras_hub.src.models.llama.llama_rotary_embedding import LlamaRotaryEmbedding

LENGTH, HEAD = 12, 16
x = np.random.default_rng(0).normal(size=(1, LENGTH, 2, HEAD)).astype(np.float32)


def rotate(factor):
    """Rotate the two halves of x by positions divided by the factor."""
    frequency = 10000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    angle = (np.arange(LENGTH)[:, None] / factor * frequency)[None, :, None]
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


for package in ("keras-hub", "keras", "jax"):
    print(package, importlib.metadata.version(package))
parent = np.array(RotaryEmbedding(scaling_factor=4.0)(x))
llama = np.array(LlamaRotaryEmbedding(position_scaling_factor=4.0)(x))
errors = [abs(parent - rotate(4)).max(), abs(llama - rotate(4)).max(), abs(llama - rotate(1)).max()]
print(f"RotaryEmbedding(scaling_factor=4): {errors[0]:.1e} from NumPy")
print(f"LlamaRotaryEmbedding(position_scaling_factor=4): {errors[1]:.1e}", end="; ")
print(f"{errors[2]:.1e} from NumPy without a factor")
shape = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 32}
models = [
    LlamaBackbone(50, intermediate_dim=32, rope_position_scaling_factor=factor, **shape)
    for factor in (1.0, 8.0)
]
models[1].set_weights(models[0].get_weights())
tokens = np.arange(20)[None]
inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
difference = abs(np.array(models[0](inputs)) - np.array(models[1](inputs))).max()
print(f"LlamaBackbone, factors 1 and 8: largest difference {difference:.1e}")
same = errors[0] < 1e-4 and errors[1] > 0.1 and errors[2] < 1e-4 and difference == 0
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
KERAS_BACKEND=jax JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 \
    "$folder/venv/bin/python" "$folder/try.py"
