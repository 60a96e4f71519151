"""Triton device functions that multiply a matrix by a vector, tile by tile; see decode.py."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel begin, with programmatic dependent launch."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the preceding kernel, whose outputs must not be read or overwritten before."""
    if PDL:
        gdc_wait()


@triton.jit
def _tile(w, rows, start, n_in: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Return the weights [ROWS, BLOCK] of rows ``rows`` from column ``start`` on, zero-padded."""
    columns = start + tl.arange(0, BLOCK)
    at = w + rows[:, None].to(tl.int64) * n_in + columns[None, :]
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=columns[None, :] < n_in, other=0.0)


@triton.jit
def _place(i, n: tl.constexpr, PLANES: tl.constexpr):
    """Return the offset of element ``i`` of an array [n] stored in PLANES; see decode.py."""
    if PLANES == 1:
        return i
    return i % PLANES * (n // PLANES) + i // PLANES


@triton.jit
def _plane(
    x, norm, start, plane: tl.constexpr,
    n: tl.constexpr, BLOCK: tl.constexpr, PLANES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """Return BLOCK elements of one plane of x, times the norm's weight if given; their squares."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < n
    at = plane * n + _place(columns, n, PLANES)
    value = tl.load(x + at, mask=inside, other=0.0).to(sums)
    square = value * value
    if norm is not None:
        value *= tl.load(norm + at, mask=inside, other=0.0).to(sums)
    return value, square


@triton.jit
def _input(
    x, norm, start, n_in: tl.constexpr, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, PLANES: tl.constexpr, sums: tl.constexpr,
):  # fmt: skip
    """Return a tile's input a, b, c, d and its squares, each [BLOCK].

    Where weights are read as WORDS of four, a, b, c and d are of the four planes; else only a is
    used.
    """
    if WORDS:
        n: tl.constexpr = n_in // 4
        a, squares_a = _plane(x, norm, start, 0, n, BLOCK, 1, sums)
        b, squares_b = _plane(x, norm, start, 1, n, BLOCK, 1, sums)
        c, squares_c = _plane(x, norm, start, 2, n, BLOCK, 1, sums)
        d, squares_d = _plane(x, norm, start, 3, n, BLOCK, 1, sums)
        squares = squares_a + squares_b + squares_c + squares_d
    else:
        a, squares = _plane(x, norm, start, 0, n_in, BLOCK, PLANES, sums)
        b, c, d = a, a, a
    return a, b, c, d, squares


@triton.jit
def _numbers(words, sums: tl.constexpr):
    """Return the four int8 weights of each word as four tensors of ``sums``.

    The GPU's instruction for it has a quarter of the other operations' rate. The bits of the float
    2^23 + n, for n < 2^23, end in those of n: the four are made unsigned at once (n = weight +
    128), each is put in the low byte of 2^23, and 2^23 + 128 is subtracted.
    """
    a, b, c, d = tl.inline_asm_elementwise(
        """{ .reg .b32 four; xor.b32 four, $4, 0x80808080;
        prmt.b32 $0, four, 0x4B000000, 0x7440; prmt.b32 $1, four, 0x4B000000, 0x7441;
        prmt.b32 $2, four, 0x4B000000, 0x7442; prmt.b32 $3, four, 0x4B000000, 0x7443; }""",
        "=f,=f,=f,=f,r", [words], is_pure=True, pack=1,
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
    )  # fmt: skip
    middle = 8388736.0  # 2^23 + 128
    a, b = (a - middle).to(sums), (b - middle).to(sums)
    return a, b, (c - middle).to(sums), (d - middle).to(sums)


@triton.jit
def _products(tile, a, b, c, d, sums: tl.constexpr, TOGETHER: tl.constexpr):
    """Return a tile times the input, summed over TOGETHER elements: [ROWS, BLOCK / TOGETHER].

    TOGETHER elements belong to one thread. A sum for each weight would take registers that the
    reads ahead need.
    """
    if tile.dtype == tl.int32:
        w_a, w_b, w_c, w_d = _numbers(tile, sums)
        products = w_a * a[None, :] + w_b * b[None, :] + w_c * c[None, :] + w_d * d[None, :]
    else:
        products = tile.to(sums) * a[None, :]
    return tl.sum(products.reshape(tile.shape[0], tile.shape[1] // TOGETHER, TOGETHER), 2)


@triton.jit
def _dot(
    x, norm, w, rows, eps: tl.constexpr,
    n_in: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return ``w[rows] rms_norm(x)`` [ROWS], or without the norm where ``norm`` is None.

    The root mean square divides the finished sum, so that x is read once.
    """
    WORDS: tl.constexpr = w.dtype.element_ty == tl.int32
    n: tl.constexpr = n_in // 4 if WORDS else n_in
    EVEN: tl.constexpr = n % BLOCK == 0
    # Consecutive elements of one thread's read of 16 bytes.
    TOGETHER: tl.constexpr = min(BLOCK, 128 // w.dtype.element_ty.primitive_bitwidth)
    tile = _tile(w, rows, 0, n, BLOCK, EVEN)
    _wait(PDL)
    total = tl.zeros([ROWS, BLOCK // TOGETHER], sums)
    squares = tl.zeros([BLOCK], sums)
    for start in tl.static_range(0, n, BLOCK):
        now = tile
        if start + BLOCK < n:
            tile = _tile(w, rows, start + BLOCK, n, BLOCK, EVEN)
        a, b, c, d, more = _input(x, norm, start, n_in, BLOCK, WORDS, PLANES, sums)
        total += _products(now, a, b, c, d, sums, TOGETHER)
        squares += more
    y = tl.sum(total, 1)
    if norm is not None:
        y *= 1.0 / tl.sqrt(tl.sum(squares, 0) / n_in + eps)
    return y


@triton.jit
def _dots(
    x, norm, w_1, w_2, rows_1, rows_2, eps: tl.constexpr,
    n_in: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, sums: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return ``w_1[rows_1] rms_norm(x)`` and ``w_2[rows_2] rms_norm(x)``, each [ROWS]."""
    WORDS: tl.constexpr = w_1.dtype.element_ty == tl.int32
    n: tl.constexpr = n_in // 4 if WORDS else n_in
    EVEN: tl.constexpr = n % BLOCK == 0
    TOGETHER: tl.constexpr = min(BLOCK, 128 // w_1.dtype.element_ty.primitive_bitwidth)
    tile_1 = _tile(w_1, rows_1, 0, n, BLOCK, EVEN)
    tile_2 = _tile(w_2, rows_2, 0, n, BLOCK, EVEN)
    _wait(PDL)
    total_1 = tl.zeros([ROWS, BLOCK // TOGETHER], sums)
    total_2 = tl.zeros([ROWS, BLOCK // TOGETHER], sums)
    squares = tl.zeros([BLOCK], sums)
    for start in tl.static_range(0, n, BLOCK):
        now_1, now_2 = tile_1, tile_2
        if start + BLOCK < n:
            tile_1 = _tile(w_1, rows_1, start + BLOCK, n, BLOCK, EVEN)
            tile_2 = _tile(w_2, rows_2, start + BLOCK, n, BLOCK, EVEN)
        a, b, c, d, more = _input(x, norm, start, n_in, BLOCK, WORDS, PLANES, sums)
        total_1 += _products(now_1, a, b, c, d, sums, TOGETHER)
        total_2 += _products(now_2, a, b, c, d, sums, TOGETHER)
        squares += more
    factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / n_in + eps)
    return tl.sum(total_1, 1) * factor, tl.sum(total_2, 1) * factor
