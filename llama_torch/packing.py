"""Several documents in one row, none of which sees another.

Axes: B batch, T position, S key position.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import TrainConfig
from .loss import IGNORE
from .step import Batch, split_window
from .tokenizer import END_OF_TEXT_ID


def splitter(config: TrainConfig) -> Callable[[Tensor], Batch]:
    """Return how windows [B, T + 1] become tokens and targets: --pack-documents, or plainly."""
    return pack_documents if config.data.pack_documents else split_window


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
    same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
    mask_BTS = same_BTS & (place_T[:, None] >= place_T)
    targets_BT = targets_BT.masked_fill(is_end, IGNORE)
    return Batch(tokens_BT, targets_BT, place_T - first_BT, mask_BTS)
