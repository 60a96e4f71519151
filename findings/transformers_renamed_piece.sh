#!/usr/bin/env bash
# A piece of tokenizer.model that added_tokens_decoder renames (InternLM2 does so: a spare piece
# becomes <|im_start|>) keeps its id in transformers 4's slow tokenizer alone. The fast one of 4,
# which is what AutoTokenizer gives, and the only one of 5 append a new token instead: its id is
# one beyond the model's last embedding row, and the id that the file states is never produced.
#
# Seen 2026-11-27 with Python 3.11, sentencepiece 0.2.3, Linux x86-64; a model of 290 pieces whose
# piece 3 is [UNUSED_1], and "3": {"content": "<|im_start|>", ...} in added_tokens_decoder:
#   transformers 4.57.6, use_fast=False: id 3, 290 tokens
#   transformers 4.57.6, use_fast=True:  id 290, 291 tokens, no warning about it
#   transformers 5.23.0:                 id 290, 291 tokens, no warning about it
#
# Run: bash findings/transformers_renamed_piece.sh [python]
# It installs both releases, one after the other, in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"

cat > "$folder/try.py" <<'PYTHON'
import io
import json
import sys
from pathlib import Path

import sentencepiece
import transformers

folder = Path(sys.argv[1])
made = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on the mat", "a quick brown fox"] * 50),
    model_writer=made, model_type="bpe", vocab_size=290, byte_fallback=True,
    user_defined_symbols=["[UNUSED_1]"], minloglevel=2,
)
folder.mkdir(exist_ok=True)
(folder / "tokenizer.model").write_bytes(made.getvalue())
flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
names = ["<unk>", "<s>", "</s>", "<|im_start|>"]
settings = {
    "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
    "eos_token": "</s>", "legacy": False,
    "added_tokens_decoder": {str(i): {"content": n, **flags} for i, n in enumerate(names)},
}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
(folder / "config.json").write_text('{"model_type": "llama"}')
for fast in [False, True] if transformers.__version__.startswith("4.") else [True]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast)
    id_ = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert id_ in tokenizer("<|im_start|>").input_ids
    kind = "fast" if fast else "slow"
    print(f"transformers {transformers.__version__} {kind} id {id_} of {len(tokenizer)}")
PYTHON

as_stated=0
check() { # version, then what is expected
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "transformers==$1" sentencepiece==0.2.3 protobuf
    "$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2> "$folder/errors" |
        tee "$folder/output" || { cat "$folder/errors"; exit 1; }
    local found
    found=$(sed -n 's/^transformers [^ ]* //p' "$folder/output" | tr '\n' ';')
    if [ "$found" != "$2" ]; then
        echo "transformers $1: stated \"$2\", found \"$found\""
        as_stated=1
    fi
}

check 4.57.6 "slow id 3 of 290;fast id 290 of 291;"
check 5.23.0 "fast id 290 of 291;"
[ "$as_stated" = 0 ] && echo "As stated."
exit "$as_stated"
