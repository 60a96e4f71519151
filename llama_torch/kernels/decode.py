"""Triton kernels that decode one token of one sequence: five a layer, each weight read once.

(``look_up`` and ``attend`` take several sequences, and serve decode_batch.py too.)

A matrix-vector product is bound by reading the matrix from memory. Its kernel loses most time at
its beginning and end, so the operations between two matrices are fused into their kernels (the
norm before, the rotation, SwiGLU or residual after), and each kernel begins to read its weights
before the preceding kernel has finished (programmatic dependent launch, CUDA Programming Guide,
on GPUs that have it): ``gdc_wait`` comes after the first read.

Sums are float32 (float64 for float64 weights) and the residual stream stays in that precision.
int8 weights have one float32 scale for each row, multiplied into the finished sum. They are read as
words of four, and their input is stored in four PLANES, elements 0, 4, 8, ..., then 1, 5, 9, ...: a
thread that reads 16 bytes of weights and of each plane has the elements that belong together, which
in plain order would have to pass through shared memory.

Arguments of the kernels, where S is the number of cache columns:

x, stream    [D] or the product's input [n], in planes; the residual stream, which is ``sums``
norm         RMSNorm's weight [D], in planes, or None
w, scale     weight [out, in] (int8: words [out, in / 4]) and its scales [out]
cos, sin     rotary tables [positions, K / 2]
position     int64 [rows], the rotary position; ``column`` int64 [1], the cache column
q            [rows, H, K]; ``keys`` and ``values`` [rows, N, S, K], ``size`` = S
ROWS, BLOCK  rows of a matrix, and columns (words) of each, that a program reads at a time
sums, PDL    dtype of the sums; whether to use programmatic dependent launch
Names: D dim, H query heads, N key/value heads, K head_dim, F hidden_dim.
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
    """Store the embedding of each sequence's token in the residual stream ``stream`` [rows, D].

    ``table`` [V, D] is the embedding's weight, ``token`` int64 [rows].
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
    """Rotate the pairs (a, b) = (x_i, x_{i + K/2}) of one head of q or k; store them, or v.

    q is stored in ``q`` [rows, H, K], k and v in ``column`` of the cache [rows, N, size, K].
    ``head`` counts the heads of q, then those of k, then those of v.
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
    """Norm ``x`` [D], project to q, k and v, rotate q and k; store q, and k and v in the cache.

    A program computes ROWS pairs (i, i + K / 2) of one head. ``w_q`` is [H K, D], ``w_k`` and
    ``w_v`` [N K, D]; their scales have one element for each row.
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
    """Store attention's output for one query head; a program reads one of SPLITS parts of the keys.

    Softmax in parts (Milakov and Gimelshein 2018), so that few heads still fill the GPU (Dao et
    al. 2023, flash-decoding). A program writes its unnormalised sum of values, maximum score and
    sum of exponentials; the last program of a head to finish, by the count ``arrived``, combines
    those of all. The mask is ``left_padded_causal_mask`` of model/masks.py: a token always attends
    to itself.

    allowed       bool [rows, S], False on hidden columns; None: none
    partial       [rows H SPLITS, K], ``tops`` and ``totals`` [rows H SPLITS]: results of parts
    arrived       int32 [rows H], zero before and after
    out           [rows, H K], in planes
    WIDTH, SLOTS  K and SPLITS rounded up to powers of two; GROUP = H / N
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
    """Add the product ``w x`` [N_OUT] of ``w`` [N_OUT, N_IN] to the residual stream, in place."""
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
    """Norm ``x`` [D], project to gate and up, store ``silu(gate) * up`` [F] (Shazeer 2020, eq. 6).

    ``w_gate`` and ``w_up`` are [F, D], F = HIDDEN.
    """
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
    """Norm ``x`` [D] and project onto the vocabulary: store the logits ``out`` [V].

    ``w`` is [V, D], V = N_OUT and D = N_IN.
    """
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N_OUT
    y = _dot(x, norm, w, tl.where(inside, rows, 0), eps, N_IN, ROWS, BLOCK, PLANES, sums, PDL)
    if QUANTIZED:
        y *= tl.load(scale + rows, mask=inside, other=0.0)
    tl.store(out + rows, y, mask=inside)
