"""Split windows into batches of tokens and targets, documents packed or not."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.loss import IGNORE
from ..model.masks import document_mask
from ..tokenizer.gpt2 import END_OF_TEXT_ID


class Batch(NamedTuple):
    """One micro-batch; positions and mask as in Llama.forward."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], IGNORE where nothing is to be learnt
    positions: Tensor | None = None  # int64 [B, T]
    mask: Tensor | None = None  # bool [B, T, T]

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor to ``device``; to a GPU without waiting for it."""
        if device.type == "cuda":  # only from contiguous pinned memory is a copy asynchronous
            pinned = (x if x is None or x.is_cuda else x.contiguous().pin_memory() for x in self)
            return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in pinned))  # type: ignore[arg-type]
        return Batch(*(x if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


def to_batch(window: Tensor) -> Batch:
    """Cut windows [B, T + 1] into tokens [B, T] and the tokens that follow them."""
    return Batch(window[:, :-1], window[:, 1:])


def pack_documents(window: Tensor, end: int = END_OF_TEXT_ID) -> Batch:
    """Cut [B, T + 1] into tokens and targets, with positions and a mask for each document.

    A document ends with ``end``, which belongs to it. Its positions count from 0, and a token
    sees those of its own document up to itself: what is computed is what each document (or the
    part of it that the window holds) gives alone. So nothing is learnt from what follows
    ``end``: it would be the first token of a document of which nothing is seen.
    """
    tokens_BT, targets_BT = window[:, :-1], window[:, 1:]
    is_end = tokens_BT == end
    document_BT = is_end.cumsum(1) - is_end.long()  # counts the ends before
    place_T = torch.arange(tokens_BT.shape[1], device=window.device)
    begins = torch.ones_like(is_end)
    begins[:, 1:] = is_end[:, :-1]
    first_BT = (place_T * begins).cummax(1).values
    targets_BT = targets_BT.masked_fill(is_end, IGNORE)
    return Batch(tokens_BT, targets_BT, place_T - first_BT, document_mask(document_BT))
