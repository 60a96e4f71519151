#!/usr/bin/env bash
# A Llama tokenizer made by transformers from tokenizer.model gives text that begins with a space
# one "▁" fewer than SentencePiece itself: " the cat" and "the cat" become the same ids. The slow
# tokenizer of transformers 4 agreed with SentencePiece; the fast one of 4 and the only one of 5
# do not. Checkpoints were trained on SentencePiece's ids.
#
# Seen 2026-11-27 with Python 3.11, sentencepiece 0.2.3, Linux x86-64, a BPE model trained as
# Llama 2's (no normalisation, whitespace kept, byte fallback), "legacy": false:
#   text          SentencePiece   4.57.6 slow   4.57.6 fast   5.23.0
#   "the cat"     ▁the ...        same          same          same
#   " the cat"    ▁ ▁the ...      same          ▁the ...      ▁the ...
#   "  the cat"   ▁ ▁ ▁the ...    same          ▁ ▁the ...    ▁ ▁the ...
#
# Run: bash findings/transformers_llama_leading_space.sh [python]
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
    normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
)
folder.mkdir(exist_ok=True)
(folder / "tokenizer.model").write_bytes(made.getvalue())
names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, **names}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
(folder / "config.json").write_text('{"model_type": "llama"}')

pieces = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
kinds = [False, True] if transformers.__version__.startswith("4.") else [True]
for fast in kinds:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast)
    fewer = []
    for text in ("the cat", " the cat", "  the cat"):
        ids, own = tokenizer(text).input_ids, pieces.encode(text)
        print(f"{text!r}: {[*map(pieces.id_to_piece, ids)]}, SentencePiece {[*map(pieces.id_to_piece, own)]}")
        fewer.append(str(len(own) - len(ids)) if own[len(own) - len(ids):] == ids else "?")
    print(f"fewer transformers {transformers.__version__} {'fast' if fast else 'slow'} {' '.join(fewer)}")
PYTHON

as_stated=0
check() { # version, then what is expected: pieces fewer for each of the three texts
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "transformers==$1" sentencepiece==0.2.3 protobuf
    "$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2> "$folder/errors" |
        tee "$folder/output" || { cat "$folder/errors"; exit 1; }
    local found
    found=$(sed -n 's/^fewer transformers [^ ]* //p' "$folder/output" | tr '\n' ';')
    if [ "$found" != "$2" ]; then
        echo "transformers $1: stated \"$2\", found \"$found\""
        as_stated=1
    fi
}

check 4.57.6 "slow 0 0 0;fast 0 1 1;"
check 5.23.0 "fast 0 1 1;"
[ "$as_stated" = 0 ] && echo "As stated."
exit "$as_stated"
