#!/usr/bin/env bash
# safetensors 0.8.0's NumPy saver writes the memory of a transposed array as it lies, under the
# shape of the view: the file holds other numbers than were saved, and nothing says so.
#
# Seen 2026-11-27 with Python 3.11, NumPy 2.x, Linux x86-64:
#   safetensors 0.7.0: a C-contiguous array, a transposed one and a Fortran-ordered one come back
#                      as they were saved
#   safetensors 0.8.0: the first as it was saved; the other two with their numbers in another
#                      order, no error and no warning
# Until it is mended, give the saver np.ascontiguousarray(x).
#
# Run: bash findings/safetensors_numpy_transposed.sh [python]
# It makes a virtual environment in a temporary folder and installs both releases there, one after
# the other. Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"

cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

warnings.simplefilter("error")
a = np.arange(6, dtype=np.float32).reshape(2, 3)
saved = {"contiguous": a, "transposed": a.T, "fortran": np.asfortranarray(a)}
path = sys.argv[1]
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}")
for name, value in saved.items():
    save_file({"x": value}, path)
    found = load_file(path)["x"]
    same = "same" if np.array_equal(found, value) else "other"
    print(f"{name}: {same}; saved {value.tolist()}, loaded {found.tolist()}")
PYTHON

as_stated=0
check() { # version, then what is expected of the three arrays
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "safetensors==$1" numpy
    "$folder/venv/bin/python" "$folder/try.py" "$folder/x.safetensors" | tee "$folder/output"
    local found
    found=$(sed -n 's/^[a-z]*: \([a-z]*\);.*/\1/p' "$folder/output" | tr '\n' ' ')
    if [ "$found" != "$2 " ]; then
        echo "safetensors $1: stated \"$2\", found \"${found% }\""
        as_stated=1
    fi
}

check 0.7.0 "same same same"
check 0.8.0 "same other other"
[ "$as_stated" = 0 ] && echo "As stated."
exit "$as_stated"
