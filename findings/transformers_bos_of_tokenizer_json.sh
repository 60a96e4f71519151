#!/usr/bin/env bash
# Whether one directory's prompts begin with BOS depends on the major version of transformers.
# Where tokenizer_config.json names LlamaTokenizer or LlamaTokenizerFast, version 4 throws away the
# post-processor of tokenizer.json and makes one from add_bos_token, which is true when it is left
# out; version 5 drops add_bos_token wherever there is a tokenizer.json and keeps its post-processor.
# With PreTrainedTokenizerFast the file decides in both.
#
# Seen 2026-11-27 with Python 3.11, Linux x86-64; "file" is what the post-processor of
# tokenizer.json puts first, "key" is add_bos_token:
#   file     key        4.57.6 Llama class   5.23.0 Llama class   PreTrainedTokenizerFast, both
#   nothing  left out   BOS                  nothing              nothing
#   nothing  true       BOS                  nothing              nothing
#   BOS      false      nothing              BOS                  BOS
# No warning in any of the twelve.
#
# Run: bash findings/transformers_bos_of_tokenizer_json.sh [python]
# It installs both releases, one after the other, in a virtual environment in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"

cat > "$folder/try.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {name: i for i, name in enumerate(["<s>", "</s>", *letters])}
(folder / "config.json").write_text('{"model_type": "llama"}')
for kind in ("LlamaTokenizerFast", "PreTrainedTokenizerFast"):
    found = []
    for template, key in (("$A", None), ("$A", True), ("<s> $A", False)):
        made = tokenizers.Tokenizer(models.BPE(vocab, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.add_special_tokens(["<s>", "</s>"])
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0)]
        )
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
        if key is not None:
            settings["add_bos_token"] = key
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        ids = transformers.AutoTokenizer.from_pretrained(folder)("hi").input_ids
        found.append("BOS" if ids[0] == 0 else "nothing")
    print(f"transformers {transformers.__version__} {kind}: {' '.join(found)}")
PYTHON

as_stated=0
check() { # version, then what is expected
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$1"
    "$folder/venv/bin/python" "$folder/try.py" "$folder/model" 2> "$folder/errors" |
        tee "$folder/output" || { cat "$folder/errors"; exit 1; }
    local found
    found=$(sed -n 's/^transformers .*: //p' "$folder/output" | tr '\n' ';')
    if [ "$found" != "$2" ]; then
        echo "transformers $1: stated \"$2\", found \"$found\""
        as_stated=1
    fi
}

check 4.57.6 "BOS BOS nothing;nothing nothing BOS;"
check 5.23.0 "nothing nothing BOS;nothing nothing BOS;"
[ "$as_stated" = 0 ] && echo "As stated."
exit "$as_stated"
