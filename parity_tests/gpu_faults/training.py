"""Faults of the loss's kernel and of the vocabulary padded for it."""

from .fault import Fault

CROSS_ENTROPY = "kernels/cross_entropy.py"
LOSS = "model/loss.py"

TRAINING = (
    Fault(
        "padding has probability",
        CROSS_ENTROPY,
        "        for start in range(0, vocab_size, BLOCK):\n"
        "            at = start + columns\n"
        "            x = tl.load(logits_ptr + at, mask=at < vocab_size,",
        "        for start in range(0, vocab_size, BLOCK):\n"
        "            at = start + columns\n"
        "            x = tl.load(logits_ptr + at, mask=at < width,",
        "columns past the vocabulary are in the normaliser",
        "one_kernel and 31",
    ),
    Fault(
        "ignored rows keep their logits",
        CROSS_ENTROPY,
        "tl.store(logits_ptr + at, zeros, mask=at < width)",
        "tl.store(logits_ptr + at, zeros, mask=at < 0)",
        "a target that does not count has a gradient",
        "one_kernel and 31",
    ),
    Fault(
        "ignored rows of one block",
        CROSS_ENTROPY,
        "        for start in range(0, width, BLOCK):\n            at = start + columns\n"
        "            zeros",
        "        for start in range(0, BLOCK, BLOCK):\n            at = start + columns\n"
        "            zeros",
        "the rest of an ignored row keeps its logits",
        "one_kernel and 4097",
    ),
    Fault(
        "half of z-loss's derivative",
        CROSS_ENTROPY,
        "factor = 1 + 2 * z_loss * log_z",
        "factor = 1 + z_loss * log_z",
        "the square's factor of two",
        "one_kernel and 31",
    ),
    Fault(
        "sum without the running maximum",
        CROSS_ENTROPY,
        "total = total * tl.exp(most - higher) + ",
        "total = total + ",
        "a later block's maximum does not rescale the sum",
        "one_kernel and 4097",
    ),
    Fault(
        "no maximum",
        CROSS_ENTROPY,
        "higher = tl.maximum(most, x)",
        "higher = tl.maximum(most * 0.0, 0.0)",
        "exponentials of large logits overflow",
        "one_kernel and 31",
    ),
    Fault(
        "target within its block",
        CROSS_ENTROPY,
        "tl.where(at == target, 1.0, 0.0)",
        "tl.where(at == target % BLOCK, 1.0, 0.0)",
        "a target past the first block is subtracted elsewhere",
        "one_kernel and 4097",
    ),
    Fault(
        "padding not zeroed past the last block",
        CROSS_ENTROPY,
        "        for start in range(0, width, BLOCK):\n            at = start + columns\n"
        "            x =",
        "        for start in range(0, vocab_size, BLOCK):\n            at = start + columns\n"
        "            x =",
        "padding keeps its logits as a gradient",
        "one_kernel and 4090",
    ),
    Fault(
        "aligned vocabulary counted",
        LOSS,
        "kernel.differentiate(logits_PV, targets_P, vocab_size, scale, z_loss)",
        "kernel.differentiate(logits_PV, targets_P, logits_PV.shape[1], scale, z_loss)",
        "rows of zeros behind the head have probability",
        "pieces",
        only_gpu=True,
    ),
)
