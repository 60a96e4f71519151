"""Triton kernels that decode one token of one sequence: five a layer, each reading weights once.

One row of activations against a matrix is bound by the memory that holds the matrix. What keeps
such a kernel from the memory's speed is mostly its beginning and end, so all work between two
matrices is folded into them (the norm before, the rotation, SwiGLU or residual after), and each
kernel starts to read its weights before the one before it has finished (programmatic dependent
launch, CUDA Programming Guide, on GPUs that have it): ``gdc_wait`` stands after the first read.

Sums are float32 (float64 for float64 weights) and the residual stream stays in that precision.
int8 weights come with one float32 scale a row, multiplied into the finished sum.
Axes: D dim, H query heads, N key/value heads, K head_dim, F hidden_dim, S key position.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _begin(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the kernel before: nothing it writes may be read, or overwritten, until then."""
    if PDL:
        gdc_wait()


@triton.jit
def _tile(w, rows, start, n_in: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Read weights [rows, BLOCK] from column ``start`` on; zeros outside the matrix."""
    columns = start + tl.arange(0, BLOCK)
    at = w + rows[:, None].to(tl.int64) * n_in + columns[None, :]
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=columns[None, :] < n_in, other=0.0)


@triton.jit
def _number(tile, sums: tl.constexpr):
    """Turn weights into numbers to compute with."""
    if tile.dtype == tl.int8 and tile.shape[1] >= 64:  # four of one thread's at a time
        # The GPU's own conversion from int8 has a quarter of the other operations' rate and would
        # be the limit. Behind a float's exponent of 2^23 an integer is its own mantissa: four are
        # made unsigned at once, each is put behind the exponent, and the exponent subtracted.
        bits = tl.inline_asm_elementwise(
            """{ .reg .b32 four; xor.b32 four, $4, 0x80808080;
            prmt.b32 $0, four, 0x4B000000, 0x7440; prmt.b32 $1, four, 0x4B000000, 0x7441;
            prmt.b32 $2, four, 0x4B000000, 0x7442; prmt.b32 $3, four, 0x4B000000, 0x7443; }""",
            "=r,=r,=r,=r,r", [tile], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        return (bits.to(tl.float32, bitcast=True) - 8388736.0).to(sums)  # 2^23 + 128
    return tile.to(sums)


@triton.jit
def _input(x, norm, start, n_in: tl.constexpr, BLOCK: tl.constexpr, sums: tl.constexpr):
    """Read the input [BLOCK], times the norm's weight if there is a norm; and its squares."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < n_in
    value = tl.load(x + columns, mask=inside, other=0.0).to(sums)
    square = value * value
    if norm is not None:
        value *= tl.load(norm + columns, mask=inside, other=0.0).to(sums)
    return value, square


@triton.jit
def _products(tile, value, sums: tl.constexpr, TOGETHER: tl.constexpr):
    """Multiply a tile by the input and add what one thread has together: [ROWS, BLOCK / TOGETHER].

    A sum for each weight would take the registers that keep more reads under way.
    """
    products = _number(tile, sums) * value[None, :]
    return tl.sum(products.reshape(tile.shape[0], tile.shape[1] // TOGETHER, TOGETHER), 2)


@triton.jit
def _dot(
    x, norm, w, rows, eps: tl.constexpr,
    n_in: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return ``rms_norm(x) @ w[rows]`` [ROWS]; the root mean square divides the finished sum."""
    EVEN: tl.constexpr = n_in % BLOCK == 0
    # Consecutive weights of one thread's read of 16 bytes.
    TOGETHER: tl.constexpr = min(BLOCK, 128 // w.dtype.element_ty.primitive_bitwidth)
    tile = _tile(w, rows, 0, n_in, BLOCK, EVEN)
    _wait(PDL)
    total = tl.zeros([ROWS, BLOCK // TOGETHER], sums)
    squares = tl.zeros([BLOCK], sums)
    for start in tl.static_range(0, n_in, BLOCK):
        now = tile
        if start + BLOCK < n_in:
            tile = _tile(w, rows, start + BLOCK, n_in, BLOCK, EVEN)
        value, square = _input(x, norm, start, n_in, BLOCK, sums)
        total += _products(now, value, sums, TOGETHER)
        squares += square
    y = tl.sum(total, 1)
    if norm is not None:
        y *= 1.0 / tl.sqrt(tl.sum(squares, 0) / n_in + eps)
    return y


@triton.jit
def _dots(
    x, norm, w_a, w_b, rows_a, rows_b, eps: tl.constexpr,
    n_in: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return the products of two sets of rows with one normed input, each [ROWS]."""
    EVEN: tl.constexpr = n_in % BLOCK == 0
    TOGETHER: tl.constexpr = min(BLOCK, 128 // w_a.dtype.element_ty.primitive_bitwidth)
    tile_a = _tile(w_a, rows_a, 0, n_in, BLOCK, EVEN)
    tile_b = _tile(w_b, rows_b, 0, n_in, BLOCK, EVEN)
    _wait(PDL)
    total_a = tl.zeros([ROWS, BLOCK // TOGETHER], sums)
    total_b = tl.zeros([ROWS, BLOCK // TOGETHER], sums)
    squares = tl.zeros([BLOCK], sums)
    for start in tl.static_range(0, n_in, BLOCK):
        now_a, now_b = tile_a, tile_b
        if start + BLOCK < n_in:
            tile_a = _tile(w_a, rows_a, start + BLOCK, n_in, BLOCK, EVEN)
            tile_b = _tile(w_b, rows_b, start + BLOCK, n_in, BLOCK, EVEN)
        value, square = _input(x, norm, start, n_in, BLOCK, sums)
        total_a += _products(now_a, value, sums, TOGETHER)
        total_b += _products(now_b, value, sums, TOGETHER)
        squares += square
    factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / n_in + eps)
    return tl.sum(total_a, 1) * factor, tl.sum(total_b, 1) * factor


@triton.jit
def look_up(
    table, token, stream,
    DIM: tl.constexpr, BLOCK: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Begin the residual stream with the embedding of each sequence's token."""
    _begin(PDL)
    _wait(PDL)
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    value = tl.load(table + tl.load(token + row).to(tl.int64) * DIM + columns, mask=inside)
    tl.store(stream + row * DIM + columns, value.to(sums), mask=inside)


@triton.jit
def norm_qkv_rope(
    x, norm, w_q, w_k, w_v, scale_q, scale_k, scale_v, cos, sin, position, column,
    q, keys, values, size, eps: tl.constexpr,
    DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, project to q, k and v, rotate q and k; k and v go to the cache's ``column``.

    A program has ROWS pairs (i, i + K / 2) of one head: what a rotation turns together.
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
    a, b = _dots(x, norm, w, w, rows, rows + HALF, eps, DIM, ROWS, BLOCK, sums, PDL)
    if QUANTIZED:
        a *= tl.load(scale + rows)
        b *= tl.load(scale + rows + HALF)
    if head < HEADS + KV_HEADS:
        angle = tl.load(position) * HALF + i
        c, s = tl.load(cos + angle).to(sums), tl.load(sin + angle).to(sums)
        a, b = a * c - b * s, b * c + a * s
    if head < HEADS:
        tl.store(q + rows, a)
        tl.store(q + rows + HALF, b)
    else:
        at = (head - base).to(tl.int64) * size * HEAD_DIM + tl.load(column) * HEAD_DIM + i
        if head < HEADS + KV_HEADS:
            tl.store(keys + at, a)
            tl.store(keys + at + HALF, b)
        else:
            tl.store(values + at, a)
            tl.store(values + at + HALF, b)


@triton.jit
def attend(
    q, keys, values, allowed, column, partial, tops, totals, arrived, out, size,
    softmax_scale: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend from one query head over its share of the keys; the last share to finish joins all.

    Softmax in parts (Milakov and Gimelshein 2018), the keys in SPLITS shares so that few heads
    still fill the GPU (Dao et al. 2023, flash-decoding). ``arrived`` counts the shares done. A
    head is one of the HEADS of one sequence, which has a row of ``allowed``; the token itself
    always is.
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
        tl.store(out + head * HEAD_DIM + channel, joined, mask=inside)


@triton.jit
def project_add(
    x, w, scale, stream,
    N_IN: tl.constexpr, N_OUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Project and add to the residual stream, in place."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N_OUT
    y = _dot(x, None, w, tl.where(inside, rows, 0), 0.0, N_IN, ROWS, BLOCK, sums, PDL)
    if QUANTIZED:
        y *= tl.load(scale + rows, mask=inside, other=0.0)
    tl.store(stream + rows, tl.load(stream + rows, mask=inside, other=0.0) + y, mask=inside)


@triton.jit
def norm_swiglu(
    x, norm, w_gate, w_up, scale_gate, scale_up, out, eps: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, project to gate and up, and return ``silu(gate) * up`` (Shazeer 2020, eq. 6)."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < HIDDEN
    safe = tl.where(inside, rows, 0)
    gate, up = _dots(x, norm, w_gate, w_up, safe, safe, eps, DIM, ROWS, BLOCK, sums, PDL)
    if QUANTIZED:
        gate *= tl.load(scale_gate + safe)
        up *= tl.load(scale_up + safe)
    tl.store(out + rows, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def norm_project(
    x, norm, w, scale, out, eps: tl.constexpr,
    N_IN: tl.constexpr, N_OUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm and project onto the vocabulary."""
    _begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N_OUT
    y = _dot(x, norm, w, tl.where(inside, rows, 0), eps, N_IN, ROWS, BLOCK, sums, PDL)
    if QUANTIZED:
        y *= tl.load(scale + rows, mask=inside, other=0.0)
    tl.store(out + rows, y, mask=inside)
