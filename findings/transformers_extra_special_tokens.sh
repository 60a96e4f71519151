#!/usr/bin/env bash
# A tokenizer that transformers 5 saves with additional special tokens cannot be loaded by
# transformers 4: version 5 writes them to tokenizer_config.json as a list under
# "extra_special_tokens" (it no longer writes "additional_special_tokens"), and 4, which knows
# that key as a dict of names, raises AttributeError: 'list' object has no attribute 'keys'.
# Where protobuf is not installed, 4 asks for that instead. Renaming the key to
# "additional_special_tokens" makes the directory load in both.
#
# Seen 2026-11-27 with Python 3.11, Linux x86-64, a PreTrainedTokenizerFast with one such token:
# saved by 5.23.0; 4.57.6 raises on it; 4.57.6 and 5.23.0 load it with the key renamed, and give
# the token the same id.
#
# Run: bash findings/transformers_extra_special_tokens.sh [python]
# It makes a virtual environment for each release in a temporary folder. Exit code 0: as stated
# above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.6 5.23.0; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
        "transformers==$version" protobuf
done

cat > "$folder/save.py" <<'PYTHON'
import sys

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(letters)}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
tokenizer.save_pretrained(sys.argv[1])
PYTHON

cat > "$folder/load.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers

path = Path(sys.argv[1]) / "tokenizer_config.json"
settings = json.loads(path.read_text())
for key in ("extra_special_tokens", "additional_special_tokens"):
    settings[key] = settings.pop("extra_special_tokens", None) or settings.pop(
        "additional_special_tokens"
    )
    settings = {k: v for k, v in settings.items() if not k.endswith("_special_tokens") or k == key}
    path.write_text(json.dumps(settings))
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
        found = f"id {tokenizer.convert_tokens_to_ids('<|tool|>')}"
    except AttributeError as error:
        found = f"AttributeError: {error}"
    print(f"transformers {transformers.__version__}, {key} {settings[key]}: {found}")
PYTHON

"$folder/5.23.0/bin/python" "$folder/save.py" "$folder/saved" 2> "$folder/errors" ||
    { cat "$folder/errors"; exit 1; }
key=$(grep -o '"[a-z]*_special_tokens"' "$folder/saved/tokenizer_config.json")
echo "written by 5.23.0: $key"
for version in 4.57.6 5.23.0; do
    cp -r "$folder/saved" "$folder/copy"
    "$folder/$version/bin/python" "$folder/load.py" "$folder/copy" 2> "$folder/errors" ||
        { cat "$folder/errors"; exit 1; }
    rm -rf "$folder/copy"
done | tee "$folder/output"
found="$key;$(sed 's/.*: //' "$folder/output" | tr '\n' ';')"
stated="\"extra_special_tokens\";'list' object has no attribute 'keys';id 256;id 256;id 256;"
if [ "$found" != "$stated" ]; then
    echo "stated: $stated, found: $found"
    exit 1
fi
echo "As stated."
