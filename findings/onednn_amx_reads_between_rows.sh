#!/usr/bin/env bash
# oneDNN's bfloat16 matrix product on a CPU with AMX reads what stands in memory between the rows
# of its left operand.
#
# x is a view of 27 rows of 274 columns whose rows are 320 elements apart. Its product with a
# 274 x 95 matrix is a function of the 27 x 274 elements alone; on a CPU with amx_bf16 the columns
# from 274 up to the next multiple of 32 are read too and multiplied by zero, so that NaN there
# makes whole rows of the product NaN. Finite numbers there change nothing. The same product is
# right in float32, where 274 is 288 (a multiple of 32), and with
# ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16.
#
# Seen with torch 2.11.0 and 2.13.0 on Intel Xeon with amx_bf16, November 2026. On a CPU without
# AMX nothing can be seen; the script says so and ends with 0.
set -euo pipefail
if ! grep -qw amx_bf16 /proc/cpuinfo; then
  echo "this processor has no amx_bf16: nothing to see"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
if [ -z "${PYTHON:-}" ]; then  # or a Python that has torch already
  python3 -m venv venv
  venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6
  PYTHON=venv/bin/python
fi
cat > product.py <<'P'
import sys

import torch


def nan_rows(columns: int, dtype: torch.dtype, between: float) -> int:
    """Return how many rows of a product are not finite."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((27, 320), between, dtype=dtype)
    memory[:, :columns] = torch.randn(27, columns, generator=generator)
    weight = torch.randn(columns, 95, generator=generator).to(dtype)
    return int((memory[:, :columns] @ weight).isnan().any(1).sum())


nan, half = float("nan"), torch.bfloat16
found = nan_rows(274, half, nan), nan_rows(274, half, 7.0)
found += nan_rows(288, half, nan), nan_rows(274, torch.float32, nan)
print("torch", torch.__version__, "rows that are NaN:", found)
print("(NaN between the rows; 7 between them; 288 columns; float32)")
sys.exit(0 if found == tuple(map(int, sys.argv[1:])) else 1)
P
"$PYTHON" product.py 27 0 0 0
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$PYTHON" product.py 0 0 0 0
echo "as described"
