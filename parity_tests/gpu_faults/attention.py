"""Faults of the attention kernel, which both kinds of decoding launch."""

from .fault import Fault

DECODE = "kernels/decode.py"
KEYS = "attention"

ATTENTION = (
    Fault(
        "a block of keys counted twice",
        DECODE,
        "min(length, (split + 1) * share), BLOCK)",
        "min(length, (split + 1) * share + 1), BLOCK)",
        "two shares have the block at their border",
        KEYS,
    ),
    Fault(
        "a key that was not written",
        DECODE,
        "may = column_at < length\n",
        "may = column_at <= length\n",
        "attention sees one column too many",
        "attention and False",  # without a mask that would hide it
    ),
    Fault(
        "values without the running maximum",
        DECODE,
        "mixed = mixed * decay + ",
        "mixed = mixed + ",
        "a later block's maximum does not rescale what came before",
        KEYS,
    ),
    Fault(
        "running maximum of the last block",
        DECODE,
        "new_top = tl.maximum(top, tl.max(score, 0))",
        "new_top = tl.max(score, 0)",
        "blocks before with larger scores overflow",
        KEYS,
    ),
    Fault(
        "joined in base 2",
        DECODE,
        "factor = tl.exp(part_top - tl.max(part_top, 0))",
        "factor = tl.exp2(part_top - tl.max(part_top, 0))",
        "exp2 of what is not in units of log 2",
        KEYS,
    ),
    Fault(
        "totals joined without their factor",
        DECODE,
        "tl.sum(part_total * factor, 0)",
        "tl.sum(part_total, 0)",
        "shares with smaller maxima count in full",
        KEYS,
    ),
    Fault(
        "no share has score zero",
        DECODE,
        'mask=there, other=float("-inf"), cache_modifier',
        "mask=there, other=0.0, cache_modifier",
        "a share that is not there sets the maximum",
        KEYS,
    ),
    Fault(
        "heads of a group interleaved",
        DECODE,
        "base = (head // GROUP)",
        "base = (head % GROUP)",
        "query heads attend to another group's keys",
        KEYS,
    ),
    Fault(
        "first row's mask for all",
        DECODE,
        "seen = allowed + (head // HEADS) * size + column_at",
        "seen = allowed + column_at",
        "a row's padding is another row's",
        KEYS,
    ),
    Fault(
        "a token that may not see itself",
        DECODE,
        " | (column_at == length - 1))\n",
        ")\n",
        "a row of padding attends to nothing",
        KEYS,
    ),
    Fault(
        "count of shares not reset",
        DECODE,
        "        tl.store(arrived + head, 0)\n",
        "",
        "the second token's shares are never joined",
        KEYS,
    ),
    Fault(
        "joined one share early",
        DECODE,
        "tl.atomic_add(arrived + head, 1) == SPLITS - 1",
        "tl.atomic_add(arrived + head, 1) == SPLITS - 2",
        "a share of the call before is joined",
        KEYS,
    ),
)
