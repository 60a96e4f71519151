#!/usr/bin/env bash
# CTranslate2 4.8.5 converts a Llama 3.1 or later without its rotary scaling: of rope_type llama3 the
# converter stores low_freq_factor and high_freq_factor, of factor and original_max_position_embeddings
# nothing, and the engine computes as if there were no scaling. No error, no warning.
#
# Seen 2026-11-28 with Python 3.11, transformers 5.23.0, torch 2.13.0, Linux x86-64; one set of
# weights, base 500000, 200 tokens, float32; largest difference of CTranslate2's logits (largest: 9.6):
#                                    from transformers'   from transformers' without scaling
#   no scaling                       3e-5                 3e-5
#   linear, factor 4                 3e-5                 13
#   llama3, factor 8 (Llama 3.1)     3.2                  3e-5
#   llama3, factor 32 (Llama 3.2)    3.5                  3e-5
# Llama 3.1, 3.2 and 3.3 run as other models than were trained.
#
# Run: bash findings/ctranslate2_llama3_scaling.sh [python]
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
import warnings
from pathlib import Path

import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.simplefilter("default")
torch.set_num_threads(1)
V = 100
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2"
)
tokens = np.random.default_rng(0).integers(3, V, (1, 200))


def model_of(**rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=131072,
        initializer_range=0.2, rope_parameters={"rope_theta": 500000.0, **rope},
    )
    return LlamaForCausalLM(config).eval()


def converted(model, folder):
    """Return CTranslate2's logits of a model that is saved, converted and loaded."""
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")
    TransformersConverter(str(folder / "saved")).convert(str(folder / "converted"))
    engine = ctranslate2.Generator(str(folder / "converted"), device="cpu", intra_threads=1)
    lengths = np.array([tokens.shape[1]], np.int32)
    view = ctranslate2.StorageView.from_array
    return np.array(engine.forward_batch(view(tokens.astype(np.int32)), view(lengths)))


@torch.no_grad()
def logits_of(model):
    return model(torch.from_numpy(tokens)).logits.numpy()


llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
llama3["original_max_position_embeddings"] = 8192
cases = {
    "no scaling": {"rope_type": "default"},
    "linear, factor 4": {"rope_type": "linear", "factor": 4.0},
    "llama3, factor 8": {**llama3, "factor": 8.0},
    "llama3, factor 32": {**llama3, "factor": 32.0},
}
print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
print("torch", torch.__version__)
unscaled = logits_of(model_of(**cases["no scaling"]))
print(f"largest logit {abs(unscaled).max():.1f}")
same = True
for name, rope in cases.items():
    model = model_of(**rope)
    found = converted(model, Path(sys.argv[1], name))
    of_it, of_none = abs(found - logits_of(model)).max(), abs(found - unscaled).max()
    print(f"{name:18} from transformers' {of_it:.1e}, from those without scaling {of_none:.1e}")
    same &= of_it > 0.05 if "llama3" in name else of_it < 1e-3
    same &= of_none > 0.05 if "linear" in name else of_none < 1e-3
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
