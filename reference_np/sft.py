"""Supervised fine-tuning: which tokens are learnt, and their loss (Llama 2, sections 3.1 and 3.3).

"We utilize an autoregressive objective and zero-out the loss on tokens from the user prompt, so as
a result, we backpropagate only on answer tokens" (section 3.1).

Axes: B batch, T position, S tokens of one conversation, V vocabulary.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from . import ops
from .config import InputError
from .grad import Batch
from .ops import IGNORE, Array

Message = TypeVar("Message", str, tuple[int, ...])


def sft_labels(segments: Sequence[tuple[Sequence[int], bool]]) -> tuple[Array, Array]:
    """Return a conversation's tokens int64 [S] and targets int64 [S] (section 3.1).

    segments  (token ids, learnt) in order. A learnt segment is an answer with its end-of-turn
              token; what opens the answer (the generation prompt) belongs to the segment before.

    The target at t is token t + 1 where that is of a learnt segment, else IGNORE. It depends on
    the token's place, never on its id: an end token is learnt although the same id also pads. The
    last position has no next token and is IGNORE; so no conversation packed behind this one is
    predicted from it. Nothing predicts the first token, learnt or not.
    """
    tokens = np.array([i for ids, _ in segments for i in ids], dtype=np.int64)
    is_learnt = np.array([learnt for ids, learnt in segments for _ in ids], dtype=bool)
    targets = np.full_like(tokens, IGNORE)
    targets[:-1] = np.where(is_learnt[1:], tokens[1:], IGNORE)
    return tokens, targets


def gatt_dialogue(
    instruction: Message, turns: Sequence[tuple[Message, Message]]
) -> list[tuple[Message, bool]]:
    """Return the segments (message, learnt) of a Ghost Attention dialogue (section 3.3).

    instruction  put before the first user message alone.
    turns        (user message, answer), texts or tuples of token ids. The answers were sampled
                 with the instruction in every user message.

    The loss is zero on "all the tokens from the previous turns, including assistant messages": the
    last answer alone is learnt. ``sft_labels`` takes the segments once they are token ids.
    """
    segments: list[tuple[Message, bool]] = []
    for i, (user, answer) in enumerate(turns):
        segments.append((instruction + user if i == 0 else user, False))
        segments.append((answer, i == len(turns) - 1))
    return segments


def pack(conversations: Sequence[tuple[Array, Array]]) -> Batch:
    """Return one row [1, T] of conversations (tokens [S], targets [S]), each on its own.

    Positions count from 0 in each, and a token attends to its own conversation up to itself. Where
    one ends is known by its length: its end token may stand inside it as well, after each turn.
    """
    tokens, targets = (np.concatenate(part)[None] for part in zip(*conversations, strict=True))
    lengths = [len(own) for own, _ in conversations]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    mask = (owner[:, None] == owner) & ops.causal_mask(len(owner), len(owner))
    return Batch(tokens, targets, positions, mask[None])


def token_loss(logits_BTV: Array, targets_BT: Array, count: int) -> float:
    """Return ``sum(-log p(target)) / count`` in nats over the targets that are not IGNORE.

    log p is the log-softmax of the logits. ``count`` is the number of learnt tokens of the whole
    step, so that the losses of its micro-batches, processes and packed rows add up to the step's
    mean; a part of it without a learnt token has the loss 0.
    """
    require_count(count)
    learnt = targets_BT != IGNORE
    # Selected before anything is computed: what stands elsewhere, NaN included, has no effect.
    return float(ops.cross_entropy_sum(logits_BTV[learnt][None], targets_BT[learnt][None])) / count


def token_loss_vjp(logits_BTV: Array, targets_BT: Array, count: int) -> Array:
    """Return d_logits [B, T, V]: ``(p - onehot(target)) / count``, and 0 where IGNORE.

    As L = sum(log Z - l_target) / count and d(log Z)/dl = p, the softmax.
    """
    require_count(count)
    learnt = targets_BT != IGNORE
    logits_NV, targets_N = logits_BTV[learnt], targets_BT[learnt]
    d_NV = np.exp(logits_NV - ops.log_sum_exp(logits_NV))
    d_NV[np.arange(len(targets_N)), targets_N] -= 1.0
    d_logits = np.zeros_like(logits_BTV)
    d_logits[learnt] = d_NV / count
    return d_logits


def require_count(count: int) -> None:
    """Raise InputError unless the whole step has something to learn."""
    if count < 1:
        raise InputError(
            f"count: {count}; the whole step needs at least one token or pair to learn"
        )
