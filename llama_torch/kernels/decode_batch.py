"""Triton kernels that decode one token of several sequences: nine a layer.

Reading the weights still takes most of the time, and the products are laid out for it: a program
has the sums of some rows of a matrix for every sequence, and reads those rows once, several tiles
ahead, for the tensor cores. Where a matrix has too few rows to occupy the GPU, its columns are
split among programs too. The next kernel (a norm, the rotation, SwiGLU) adds the partial sums,
as it reads all of a sequence's elements anyway.

Sums and the residual stream are float32 (float64 for float64 weights); a matrix's input is in the
model's precision, and its plain order. ``gdc_wait`` and the scales of int8 weights are as in
decode.py, and so are the arguments of the kernels. ``parts`` are partial sums [SPLITS, B, n] of a
product of n outputs; ``n_rows`` is B.
Names: B sequence (row), D dim, H query heads, N key/value heads, K head_dim, F hidden_dim.
"""

import triton
import triton.language as tl

from .decode import _rotate_and_store
from .gemv import _begin, _wait

FETCHED = tl.constexpr(8)  # lines of 128 bytes of each row that are prefetched


@triton.jit
def _joined(parts, at, inside, stride, SPLITS: tl.constexpr):
    """Return a product's elements ``at``: the sum of SPLITS partial sums, ``stride`` apart."""
    total = tl.load(parts + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * stride + at, mask=inside, other=0.0)
    return total


@triton.jit
def add_norm(
    stream, parts, norm, out, n_rows, eps: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add a product (if SPLITS > 0) to the residual stream [B, D]; store its RMSNorm in ``out``.

    A program computes one sequence's row. ``parts`` is [SPLITS, B, D].
    """
    _begin(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    scale = tl.load(norm + columns, mask=inside, other=0.0).to(sums)
    _wait(PDL)
    at = tl.program_id(0) * DIM + columns
    x = tl.load(stream + at, mask=inside, other=0.0)
    if SPLITS:
        x += _joined(parts, at, inside, n_rows * DIM, SPLITS)
        tl.store(stream + at, x, mask=inside)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)) * scale
    tl.store(out + at, y, mask=inside)


@triton.jit
def _fetch(at, PDL: tl.constexpr):
    """Prefetch lines of weights into the cache while the preceding kernel still runs."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def project(
    x, w_a, w_b, w_c, scale_a, scale_b, scale_c, out, n_rows,
    N_IN: tl.constexpr, N_A: tl.constexpr, N_B: tl.constexpr, N_C: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, QUANTIZED: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store x [PADDED, N_IN] times up to three matrices as ``out`` [SPLITS, B, N_A + N_B + N_C].

    A program computes ROWS rows of one matrix, over one of SPLITS parts of their columns. ``w_a``
    is [N_A, N_IN], and so on; x has zeros in the rows beyond B.
    """
    _begin(PDL)
    program = tl.program_id(0)
    of_a: tl.constexpr = (N_A + ROWS - 1) // ROWS
    of_b: tl.constexpr = (N_B + ROWS - 1) // ROWS
    w, scale, n, before = w_a, scale_a, N_A, 0
    first = program * ROWS
    if program >= of_a:
        w, scale, n, before = w_b, scale_b, N_B, N_A
        first = (program - of_a) * ROWS
    if program >= of_a + of_b:
        w, scale, n, before = w_c, scale_c, N_C, N_A + N_B
        first = (program - of_a - of_b) * ROWS
    rows = first + tl.arange(0, ROWS)
    SHARE: tl.constexpr = ((N_IN + SPLITS - 1) // SPLITS + BLOCK - 1) // BLOCK * BLOCK
    begin = tl.program_id(1) * SHARE
    m = tl.arange(0, PADDED)
    columns = tl.arange(0, BLOCK)
    safe = tl.where(rows < n, rows, 0).to(tl.int64)
    at_w = w + safe[:, None] * N_IN + columns[None, :]
    at_x = x + m[None, :] * N_IN + columns[:, None]
    total = tl.zeros([ROWS, PADDED], sums)
    LINE: tl.constexpr = 1024 // w_a.dtype.element_ty.primitive_bitwidth  # weights in 128 bytes
    lines = begin + tl.arange(0, FETCHED) * LINE
    _fetch(w + safe[:, None] * N_IN + tl.where(lines < N_IN, lines, 0)[None, :], PDL)
    _wait(PDL)
    for start in tl.range(begin, begin + SHARE, BLOCK, num_stages=STAGES):
        if SHARE * SPLITS == N_IN:
            tile, value = tl.load(at_w + start), tl.load(at_x + start)
        else:
            inside = start + columns < N_IN
            tile = tl.load(at_w + start, mask=inside[None, :], other=0)
            value = tl.load(at_x + start, mask=inside[:, None], other=0.0)
        if QUANTIZED and sums == tl.float64:  # no product of Triton's takes such a pair
            total += tl.sum(tile.to(sums)[:, :, None] * value[None, :, :], 1)
        else:
            tile = tile.to(value.dtype)
            total = tl.dot(tile, value, total, input_precision="ieee", out_dtype=sums)
    if QUANTIZED:
        total *= tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    width: tl.constexpr = N_A + N_B + N_C
    at = (tl.program_id(1) * n_rows + m[None, :]) * width + before + rows[:, None]
    tl.store(out + at, total, mask=(rows[:, None] < n) & (m[None, :] < n_rows))


@triton.jit
def rope(
    parts, cos, sin, position, column, q, keys, values, n_rows, size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one sequence; store it in ``q``, or in ``column`` of the cache.

    ``parts`` is [SPLITS, B, (H + 2 N) K]: q, k and v side by side.
    """
    _begin(PDL)
    _wait(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    at = row * WIDTH + head * HEAD_DIM + i
    a = _joined(parts, at, inside, n_rows * WIDTH, SPLITS)
    b = _joined(parts, at + HALF, inside, n_rows * WIDTH, SPLITS)
    _rotate_and_store(
        a, b, i, inside, row, head, cos, sin, position, column, q, keys, values, size,
        HEADS, KV_HEADS, HEAD_DIM, sums,
    )  # fmt: skip


@triton.jit
def swiglu(
    parts, out, n_rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store ``silu(gate) * up`` [B, F] (Shazeer 2020, eq. 6), F = HIDDEN.

    ``parts`` is [SPLITS, B, 2 F]: gate and up side by side.
    """
    _begin(PDL)
    _wait(PDL)
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < HIDDEN
    at = row * 2 * HIDDEN + i
    gate = _joined(parts, at, inside, n_rows * 2 * HIDDEN, SPLITS)
    up = _joined(parts, at + HIDDEN, inside, n_rows * 2 * HIDDEN, SPLITS)
    tl.store(out + row * HIDDEN + i, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)
