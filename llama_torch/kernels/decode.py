"""Triton kernels that decode one token of one sequence: five a layer, each reads its weights once.

(``look_up`` and ``attend`` take several, and serve decode_batch.py too.)

A product of one row and a matrix is bound by the memory that holds the matrix. A kernel of it
loses most time at its beginning and end, so the operations between two matrices are fused into
their kernels (the norm before, the rotation, SwiGLU or residual after), and each kernel starts to
read its weights before its predecessor has finished (programmatic dependent launch, CUDA
Programming Guide, on GPUs that have it): ``gdc_wait`` stands after the first read.

Sums are float32 (float64 for float64 weights) and the residual stream stays in that precision.
int8 weights have one float32 scale a row, multiplied into the finished sum. They are read as words
of four, and their input is stored in four PLANES, numbers 0, 4, 8, ..., then 1, 5, 9, ...: a thread
that reads 16 bytes of weights and of each plane holds matching numbers, which in plain order would
have to pass through shared memory.
Names: D dim, H query heads, N key/value heads, K head_dim, F hidden_dim, S key position.
"""

import triton
import triton.language as tl

from .gemv import _begin, _dot, _dots, _place, _wait


@triton.jit
def look_up(
    table, token, stream,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store the embedding of each sequence's token in the residual stream.

    ``table`` [V, D], ``token`` int64 [rows], ``stream`` [rows, D].
    """
    _begin(PDL)
    _wait(PDL)
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    value = tl.load(table + tl.load(token + row).to(tl.int64) * DIM + columns, mask=inside)
    tl.store(stream + row * DIM + _place(columns, DIM, PLANES), value.to(sums), mask=inside)


@triton.jit
def _rotate_and_store(
    a, b, i, inside, row, head, cos, sin, position, column, q, keys, values, size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """Rotate pairs (a, b) at ``i`` and ``i + K / 2`` of one head of q or k; store them, or v.

    q goes to ``q`` [rows, H, K], k and v to ``column`` of the cache [rows, N, size, K]. ``head``
    numbers the heads of q, k and v consecutively; ``cos`` and ``sin`` are [positions, K / 2].
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    if head < HEADS + KV_HEADS:
        angle = tl.load(position + row) * HALF + i
        c, s = (
            tl.load(cos + angle, mask=inside).to(sums),
            tl.load(sin + angle, mask=inside).to(sums),
        )
        a, b = a * c - b * s, b * c + a * s
    if head < HEADS:
        of_q = (row * HEADS + head) * HEAD_DIM + i
        tl.store(q + of_q, a, mask=inside)
        tl.store(q + of_q + HALF, b, mask=inside)
    else:
        group = row * KV_HEADS + (head - HEADS) % KV_HEADS
        at = (group.to(tl.int64) * size + tl.load(column)) * HEAD_DIM + i
        if head < HEADS + KV_HEADS:
            tl.store(keys + at, a, mask=inside)
            tl.store(keys + at + HALF, b, mask=inside)
        else:
            tl.store(values + at, a, mask=inside)
            tl.store(values + at + HALF, b, mask=inside)


@triton.jit
def norm_qkv_rope(
    x, norm, w_q, w_k, w_v, scale_q, scale_k, scale_v, cos, sin, position, column,
    q, keys, values, size, eps: tl.constexpr,
    DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, project to q, k and v, rotate q and k; store k and v in the cache's ``column``.

    A program computes ROWS pairs (i, i + K / 2) of one head, which are rotated together. ``x`` [D],
    ``w_q`` [H K, D], ``w_k`` and ``w_v`` [N K, D], their scales one a row.
    """
    _begin(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    first = tl.program_id(0) * ROWS
    head = first // HALF
    i = first % HALF + tl.arange(0, ROWS)
    w, scale, base = w_v, scale_v, HEADS + KV_HEADS
    if head < HEADS + KV_HEADS:
        w, scale, base = w_k, scale_k, HEADS
    if head < HEADS:
        w, scale, base = w_q, scale_q, 0
    rows = (head - base) * HEAD_DIM + i
    a, b = _dots(x, norm, w, w, rows, rows + HALF, eps, DIM, ROWS, BLOCK, PLANES, sums, PDL)
    if QUANTIZED:
        a *= tl.load(scale + rows)
        b *= tl.load(scale + rows + HALF)
    _rotate_and_store(
        a, b, i, None, 0, head, cos, sin, position, column, q, keys, values, size,
        HEADS, KV_HEADS, HEAD_DIM, sums,
    )  # fmt: skip


@triton.jit
def attend(
    q, keys, values, allowed, column, partial, tops, totals, arrived, out, size,
    softmax_scale: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend from one query head over its share of the keys; the last share to finish joins all.

    Softmax in parts (Milakov and Gimelshein 2018), the keys in SPLITS shares so that few heads
    still fill the GPU (Dao et al. 2023, flash-decoding). ``arrived`` counts the shares done. A
    head is one of the HEADS of one sequence, which has a row of ``allowed``. The mask is
    ``left_padded_causal_mask`` of model/masks.py: a token always attends to itself.
    """
    _begin(PDL)
    _wait(PDL)
    head, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(column) + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    channel = tl.arange(0, WIDTH)
    inside = channel < HEAD_DIM
    query = tl.load(q + head * HEAD_DIM + channel, mask=inside, other=0.0).to(sums)
    query *= softmax_scale
    base = (head // GROUP).to(tl.int64) * size * HEAD_DIM
    top = tl.full([], float("-inf"), sums)
    total = tl.zeros([], sums)
    mixed = tl.zeros([WIDTH], sums)
    for start in range(split * share, min(length, (split + 1) * share), BLOCK):
        column_at = start + tl.arange(0, BLOCK)
        may = column_at < length
        if allowed is not None:
            seen = allowed + (head // HEADS) * size + column_at
            may = may & ((tl.load(seen, mask=may, other=0) != 0) | (column_at == length - 1))
        at = base + column_at[:, None] * HEAD_DIM + channel[None, :]
        both = may[:, None] & inside[None, :]
        key = tl.load(keys + at, mask=both, other=0.0).to(sums)
        value = tl.load(values + at, mask=both, other=0.0).to(sums)
        score = tl.where(may, tl.sum(key * query[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing allowed so far
        weight = tl.exp(score - shift)
        decay = tl.exp(top - shift)
        total = total * decay + tl.sum(weight, 0)
        mixed = mixed * decay + tl.sum(weight[:, None] * value, 0)
        top = new_top
    slot = head * SPLITS + split
    tl.store(partial + slot * HEAD_DIM + channel, mixed, mask=inside)
    tl.store(tops + slot, top)
    tl.store(totals + slot, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived + head, 1) == SPLITS - 1:
        tl.store(arrived + head, 0)
        slots = tl.arange(0, SLOTS)
        there = slots < SPLITS
        slots += head * SPLITS
        part_top = tl.load(tops + slots, mask=there, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(totals + slots, mask=there, other=0.0, cache_modifier=".cg")
        factor = tl.exp(part_top - tl.max(part_top, 0))
        at = partial + slots[:, None] * HEAD_DIM + channel[None, :]
        both = there[:, None] & inside[None, :]
        parts = tl.load(at, mask=both, other=0.0, cache_modifier=".cg")
        joined = tl.sum(parts * factor[:, None], 0) / tl.sum(part_total * factor, 0)
        of_row = head % HEADS * HEAD_DIM + channel
        WIDE: tl.constexpr = HEADS * HEAD_DIM
        at_out = head // HEADS * WIDE + _place(of_row, WIDE, PLANES)
        tl.store(out + at_out, joined, mask=inside)


@triton.jit
def project_add(
    x, w, scale, stream,
    N_IN: tl.constexpr, N_OUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Project, and add the product [D] to the residual stream, in place."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N_OUT
    y = _dot(x, None, w, tl.where(inside, rows, 0), 0.0, N_IN, ROWS, BLOCK, PLANES, sums, PDL)
    if QUANTIZED:
        y *= tl.load(scale + rows, mask=inside, other=0.0)
    at = stream + _place(rows, N_OUT, PLANES)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + y, mask=inside)


@triton.jit
def norm_swiglu(
    x, norm, w_gate, w_up, scale_gate, scale_up, out, eps: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, project to gate and up, and store ``silu(gate) * up`` [F] (Shazeer 2020, eq. 6)."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < HIDDEN
    safe = tl.where(inside, rows, 0)
    gate, up = _dots(x, norm, w_gate, w_up, safe, safe, eps, DIM, ROWS, BLOCK, PLANES, sums, PDL)
    if QUANTIZED:
        gate *= tl.load(scale_gate + safe)
        up *= tl.load(scale_up + safe)
    at = out + _place(rows, HIDDEN, PLANES)
    tl.store(at, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def norm_project(
    x, norm, w, scale, out, eps: tl.constexpr,
    N_IN: tl.constexpr, N_OUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, and project onto the vocabulary: logits [V]."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N_OUT
    y = _dot(x, norm, w, tl.where(inside, rows, 0), eps, N_IN, ROWS, BLOCK, PLANES, sums, PDL)
    if QUANTIZED:
        y *= tl.load(scale + rows, mask=inside, other=0.0)
    tl.store(out + rows, y, mask=inside)
