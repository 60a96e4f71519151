"""Split windows into micro-batches of tokens and targets, with or without documents.

Suffixes: B batch (row), T position.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.loss import IGNORE_INDEX
from ..model.masks import Documents, Mask
from ..tokenizer.gpt2 import END_OF_TEXT_ID


class Batch(NamedTuple):
    """One micro-batch; positions and mask are Llama.forward's."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORE_INDEX where the loss leaves the target out
    positions: Tensor | None = None  # int64 [B, T]
    mask: Mask | None = None  # bool [B, T, T], or Documents

    @property
    def dense_mask(self) -> Tensor | None:
        """The mask, bool [B, T, T], that ``mask`` is or stands for."""
        mask = self.mask
        return mask.dense(len(self.tokens)) if isinstance(mask, Documents) else mask

    def to(self, device: torch.device) -> "Batch":
        """Copy every tensor to ``device``, to a GPU asynchronously."""
        mask = self.mask
        if isinstance(mask, Documents):
            mask = replace(mask, starts=_copied(mask.starts, device))
        elif mask is not None:
            mask = _copied(mask, device)
        positions = None if self.positions is None else _copied(self.positions, device)
        return Batch(_copied(self.tokens, device), _copied(self.targets, device), positions, mask)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not x.is_cuda:
        x = x.contiguous().pin_memory()  # only from such memory is a copy asynchronous
    return x.to(device, non_blocking=device.type == "cuda")


def batch_function(packs: bool, eos_id: int) -> Callable[[Tensor], Batch]:
    """Return ``to_batch``, or ``pack_documents`` for documents that end with ``eos_id``."""
    return partial(pack_documents, eos_id=eos_id) if packs else to_batch


def to_batch(window: Tensor) -> Batch:
    """Split windows [B, T + 1] into tokens [B, T] and targets [B, T], each token's next one."""
    return Batch(window[:, :-1], window[:, 1:])


def pack_documents(window: Tensor, eos_id: int = END_OF_TEXT_ID) -> Batch:
    """Split windows [B, T + 1] into tokens and targets, with positions and documents.

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
    documents = Documents.from_starts(is_start)
    return Batch(tokens_BT, targets_BT, index_T - document_start_BT, documents)
