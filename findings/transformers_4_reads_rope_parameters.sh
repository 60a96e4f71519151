#!/usr/bin/env bash
# transformers 4.57.6 reads the config.json of a Llama that transformers 5 saved with a rotary base of
# 10000 and without rotary scaling, and says nothing: version 5 writes both in rope_parameters, a key
# that the Llama of version 4 does not read.
#
# Seen 2026-11-28 with Python 3.11, Linux x86-64, no torch; LlamaConfig of 5.23.0 with Llama 3.2's
# rotary values, saved by save_pretrained:
#              rope_theta   kind of scaling
#   5.23.0     500000       llama3
#   4.57.6     10000        None
# The other way round all is well: 5.23.0 reads what 4.57.6 saved. Who saves with 5 for users of 4
# must write rope_theta and rope_scaling at the top level of config.json as well.
#
# Run: bash findings/transformers_4_reads_rope_parameters.sh [python]
# It makes a virtual environment for each release in a temporary folder.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.6; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
        "transformers==$version"
done

cat > "$folder/save.py" <<'PYTHON'
import sys

import transformers

scaling = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
theta = {"rope_theta": 500000.0}
if transformers.__version__.startswith("5."):
    rope = {"rope_parameters": {**theta, **scaling}}
else:
    rope = {**theta, "rope_scaling": scaling}
transformers.LlamaConfig(max_position_embeddings=131072, **rope).save_pretrained(sys.argv[1])
PYTHON

cat > "$folder/read.py" <<'PYTHON'
import sys
import warnings

import transformers

warnings.simplefilter("error")
config = transformers.LlamaConfig.from_pretrained(sys.argv[1])
if transformers.__version__.startswith("5."):
    theta, scaling = config.rope_parameters["rope_theta"], config.rope_parameters
else:
    theta, scaling = config.rope_theta, config.rope_scaling
print(f"{theta:.0f}", scaling and scaling["rope_type"])
PYTHON

as_stated=0
check() { # the release that saves, the release that reads, what is expected
    local found said
    "$folder/$1/bin/python" "$folder/save.py" "$folder/saved by $1" 2> /dev/null
    found=$("$folder/$2/bin/python" "$folder/read.py" "$folder/saved by $1" 2> "$folder/errors") ||
        { cat "$folder/errors"; exit 1; }
    # 5 says at each start that there is no torch; a line about the rotary values would count.
    said=$(grep -ic rope "$folder/errors" || true)
    echo "saved by transformers $1, read by $2: $found; lines about it on stderr: $said"
    if [ "$found; $said" != "$3; 0" ]; then
        echo "stated \"$3; 0\", found \"$found; $said\""
        as_stated=1
    fi
}

check 5.23.0 5.23.0 "500000 llama3"
check 5.23.0 4.57.6 "10000 None"
check 4.57.6 5.23.0 "500000 llama3"
[ "$as_stated" = 0 ] && echo "As stated."
exit "$as_stated"
