"""Split windows into micro-batches of tokens and targets, with or without document masks.

Suffixes: B batch (row), T position.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.loss import IGNORE_INDEX
from ..model.masks import document_mask
from ..tokenizer.gpt2 import END_OF_TEXT_ID


class Batch(NamedTuple):
    """One micro-batch; positions and mask are Llama.forward's."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORE_INDEX where the loss leaves the target out
    positions: Tensor | None = None  # int64 [B, T]
    mask: Tensor | None = None  # bool [B, T, T]

    def to(self, device: torch.device) -> "Batch":
        """Copy every tensor to ``device``, to a GPU asynchronously."""
        if device.type == "cuda":  # only from contiguous pinned memory is a copy asynchronous
            pinned = (x if x is None or x.is_cuda else x.contiguous().pin_memory() for x in self)
            return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in pinned))  # type: ignore[arg-type]
        return Batch(*(x if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


def batch_function(packs: bool, eos_id: int) -> Callable[[Tensor], Batch]:
    """Return ``to_batch``, or ``pack_documents`` for documents that end with ``eos_id``."""
    return partial(pack_documents, eos_id=eos_id) if packs else to_batch


def to_batch(window: Tensor) -> Batch:
    """Split windows [B, T + 1] into tokens [B, T] and targets [B, T], each token's next one."""
    return Batch(window[:, :-1], window[:, 1:])


def pack_documents(window: Tensor, eos_id: int = END_OF_TEXT_ID) -> Batch:
    """Split windows [B, T + 1] into tokens and targets, with positions and mask by document.

    A document ends with ``eos_id``, which belongs to it. Positions count from 0 in each document,
    and a token attends to its own document up to itself, so each document (or its part in the
    window) gives the logits it gives alone. The target after ``eos_id`` is IGNORE_INDEX: it is the
    first token of another document.
    """
    tokens_BT, targets_BT = window[:, :-1], window[:, 1:]
    is_end = tokens_BT == eos_id
    document_BT = is_end.cumsum(1) - is_end.long()  # number of earlier ends
    return by_document(tokens_BT, targets_BT.masked_fill(is_end, IGNORE_INDEX), document_BT)


def by_document(tokens_BT: Tensor, targets_BT: Tensor, document_BT: Tensor) -> Batch:
    """Return a micro-batch in which each document of a row is on its own, from int64 [B, T] each.

    ``document_BT`` is the number of each token's document in its row, and a document's tokens are
    consecutive. Positions count from 0 in each document, and a token attends to its own document
    up to itself.
    """
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    is_start = torch.ones_like(document_BT, dtype=torch.bool)
    is_start[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    document_start_BT = (index_T * is_start).cummax(1).values
    return Batch(tokens_BT, targets_BT, index_T - document_start_BT, document_mask(document_BT))
