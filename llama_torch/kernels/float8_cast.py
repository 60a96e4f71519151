"""Triton kernel that casts a matrix to fp8, and its transpose in the same pass."""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS, COLUMNS = 64, 256  # of a tile: the transpose is written in lines of 64 bytes


@triton.jit
def _cast_kernel(
    x, multiplier, out, transposed, start, n_rows, n_columns, line,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one tile of ``x * multiplier`` from row ``start`` on, and its transpose [K, line]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < n_rows) & (column[None, :] < n_columns)
    at = row[:, None].to(tl.int64) * n_columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(multiplier)
    cast = value.to(out.dtype.element_ty)
    # ``start`` is added to a tensor: where it is specialised, to 0 or 1, it has no ``to``.
    out_row = row + start
    at = out_row[:, None].to(tl.int64) * n_columns + column[None, :]
    tl.store(out + at, cast, mask=inside)
    at = column[:, None].to(tl.int64) * line + out_row[None, :]
    tl.store(transposed + at, tl.trans(cast), mask=tl.trans(inside))


@triton_op("llama_torch::cast_float8", mutates_args={"out", "transposed"})
def cast_float8(x: Tensor, multiplier: Tensor, out: Tensor, transposed: Tensor, start: int) -> None:
    """Write the fp8 cast of ``x * multiplier`` [m, K] to rows of ``out``, and its transpose.

    x           [m, K] on a CUDA device, contiguous, bfloat16.
    multiplier  float32 [], with which no value is beyond the type's largest.
    out         fp8 [M, K], contiguous, written from row ``start`` on.
    transposed  fp8 [K, M], contiguous, written from column ``start`` on.
    """
    n_rows, n_columns = x.shape
    grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS))
    wrap_triton(_cast_kernel)[grid](
        x, multiplier, out, transposed, start, n_rows, n_columns, transposed.shape[1],
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
