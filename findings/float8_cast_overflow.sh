#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 (NumPy's and JAX's fp8) cast what is beyond the largest value of
# float8_e4m3fn, 448, to different things: torch saturates, infinity too, ml_dtypes gives NaN. A cast to
# float8_e5m2, whose largest value is 57,344, is the same in both: infinity.
#
# Seen 2026-11-28 with Python 3.11, NumPy 2.4.6, Linux x86-64, on the CPU, eager and by torch.compile:
#                      464    465    500    infinity   NaN
#   e4m3fn, torch      448    448    448    448        NaN
#   e4m3fn, ml_dtypes  448    NaN    NaN    NaN        NaN
#                      61,439   61,440     70,000     infinity
#   e5m2, both         57,344   infinity   infinity   infinity
# So an overflow is gone after a cast to e4m3fn in torch, and a check for finite numbers after it finds none;
# the same code on JAX has NaN. (torch 2.11's eager cast gave NaN for 500 on a GPU, and its compiled one 448.)
# Choose a scale with which nothing is beyond the largest value, and look for infinities before the cast.
#
# Run: bash findings/float8_cast_overflow.sh [python]
# It installs PyTorch, NumPy and ml_dtypes in a virtual environment in a temporary folder; torch.compile
# needs a C++ compiler.
# Exit code 0: as stated above; 1: not.
set -euo pipefail

python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6

cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import math
import sys

import ml_dtypes
import numpy as np
import torch

INF, NAN = math.inf, math.nan
STATED = {
    "e4m3fn": ([464.0, 465.0, 500.0, INF, NAN], [448.0] * 4 + [NAN], [448.0] + [NAN] * 4),
    "e5m2": ([61439.0, 61440.0, 70000.0, INF], [57344.0, INF, INF, INF], [57344.0, INF, INF, INF]),
}
for name in ("torch", "ml_dtypes", "numpy"):
    print(name, importlib.metadata.version(name))
as_stated = True
for kind, (values, of_torch, of_ml_dtypes) in STATED.items():
    x = torch.tensor(values)
    there = x.to(getattr(torch, f"float8_{kind}")).float().numpy()
    compiled = torch.compile(lambda x, to=getattr(torch, f"float8_{kind}"): x.to(to))
    seen = {"torch": (there, of_torch), "torch.compile": (compiled(x).float().numpy(), of_torch)}
    cast = x.numpy().astype(getattr(ml_dtypes, f"float8_{kind}")).astype(np.float32)
    seen["ml_dtypes"] = (cast, of_ml_dtypes)
    for name, (found, stated) in seen.items():
        print(f"{kind:7s} {name:14s} {values} -> {found.tolist()}")
        as_stated &= np.array_equal(found, np.array(stated, np.float32), equal_nan=True)
print("As stated." if as_stated else "Not as stated.")
sys.exit(0 if as_stated else 1)
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
