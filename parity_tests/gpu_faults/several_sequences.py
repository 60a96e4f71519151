"""Faults of the kernels that decode several sequences, and of their launches."""

from .fault import Fault

DECODE_BATCH = "kernels/decode_batch.py"
TRITON_BATCH_STEP = "inference/triton_batch_step.py"
ROWS = "several and less and float64"

SEVERAL = (
    Fault(
        "a share of a product counted twice",
        DECODE_BATCH,
        "tl.load(parts + split * stride + at,",
        "tl.load(parts + (split - 1) * stride + at,",
        "the first share is added again instead of the last",
        "several and leftovers and float64",
    ),
    Fault(
        "mean over the block",
        DECODE_BATCH,
        "tl.sum(x * x, 0) / DIM + eps",
        "tl.sum(x * x, 0) / BLOCK + eps",
        "a norm divides by the padded width",
        ROWS,
    ),
    Fault(
        "shares rounded down",
        DECODE_BATCH,
        "// SPLITS + BLOCK - 1) // BLOCK * BLOCK",
        "// SPLITS) // BLOCK * BLOCK",
        "leftover columns are nobody's",
        "several and leftovers and float64",
    ),
    Fault(
        "a share beyond the row's end",
        DECODE_BATCH,
        "if SHARE * SPLITS == N_IN:",
        "if N_IN % BLOCK == 0:",
        "the last share reads the next row",
        "several and not_whole",
    ),
    Fault(
        "third matrix's rows",
        DECODE_BATCH,
        "first = (program - of_a - of_b) * ROWS",
        "first = (program - of_b) * ROWS",
        "values are made from rows that are not there",
        ROWS,
    ),
    Fault(
        "scale of the first rows",
        DECODE_BATCH,
        "total *= tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]",
        "total *= tl.load(scale + rows - first, mask=rows < n, other=0.0)[:, None]",
        "int8: every program takes the first rows' scales",
        "several and leftovers and int8",
    ),
    Fault(
        "padding rows over the next share",
        DECODE_BATCH,
        "mask=(rows[:, None] < n) & (m[None, :] < n_rows))",
        "mask=rows[:, None] < n)",
        "rows that are not there are written over another share's",
        "several and leftovers and float64",
    ),
    Fault(
        "one product's shares for another",
        TRITON_BATCH_STEP,
        "self._norm(layer.post_attention_layernorm, splits)",
        "self._norm(layer.post_attention_layernorm, 1)",
        "attention's output is added in part",
        "several and leftovers and float64",
    ),
    Fault(
        "rows beyond the tensor cores' least",
        TRITON_BATCH_STEP,
        "self.padded_rows = next_power_of_2(max(self.rows, 16))",
        "self.padded_rows = 16",
        "rows from 16 on are not computed",
        "several and leftovers and float64",
    ),
)
