#!/usr/bin/env bash
# torch's CPU kernel adds the gradients of a bfloat16 embedding in bfloat16.
#
# Seen with torch 2.13.0+cpu (AVX2 and baseline kernels, one thread and two): 16,384 tokens, half of
# them one token. Output gradients of one: the common token's gradient is 256 instead of about
# 8,200, the whole 97% off. Normal output gradients: 7%. With index_select, or a float32 copy of
# the weight, it is 0.05% and 0.16%, the rounding of the result.
#
# Exits with 1 where torch behaves differently. Needs python3 and pip; writes to a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
generator = torch.Generator().manual_seed(0)
vocab_size, dim, n_tokens = 300, 64, 16384
tokens = torch.randint(1, vocab_size, (n_tokens,), generator=generator)
tokens[torch.rand(n_tokens, generator=generator) < 0.5] = 0
lookups = {
    "F.embedding(tokens, weight)": lambda w: F.embedding(tokens, w),
    "weight.index_select(0, tokens)": lambda w: w.index_select(0, tokens),
    "F.embedding(tokens, weight.float())": lambda w: F.embedding(tokens, w.float()).bfloat16(),
}
d_outs = {
    "ones": torch.ones(n_tokens, dim),
    "normal": torch.randn(n_tokens, dim, generator=generator),
}
found = {}
for kind, d_out in d_outs.items():
    d_out = d_out.bfloat16()
    exact = torch.zeros(vocab_size, dim, dtype=torch.float64).index_add_(0, tokens, d_out.double())
    for name, look_up in lookups.items():
        weight = torch.zeros(vocab_size, dim, dtype=torch.bfloat16, requires_grad=True)
        look_up(weight).backward(d_out)
        error = float((weight.grad.double() - exact).norm() / exact.norm())
        found[kind, name] = error
        common = f"token 0: {weight.grad[0, 0].item():.0f} of {exact[0, 0].item():.0f}"
        print(f"{kind:7} {name:36} relative error {error:.1e}  {common}")
first, *others = lookups
same = found["ones", first] > 0.9 and found["normal", first] > 0.03
same = same and all(found[kind, name] < 4e-3 for kind in d_outs for name in others)
print("as described" if same else "NOT as described")
sys.exit(not same)
PYTHON
