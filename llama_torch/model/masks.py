"""Attention masks: causal, causal with padding on the left, and causal within documents.

A mask is a bool tensor, True where a query may attend to a key. (The Triton kernel ``attend`` of
kernels/decode.py computes ``left_padded_causal_mask`` itself.)
Suffixes: B batch, T query position, S key position (cache column).
"""

import torch
from torch import Tensor


def default_mask(n_queries: int, n_cached: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """Return the causal mask [1, T, S] or None, and torch's ``is_causal`` flag in its place.

    Without a cache the flag is enough. After a cache a single query attends to every key, and
    needs no mask; several queries need one, as torch's flag aligns the first query with the
    first key.
    """
    needs_mask = n_cached > 0 and n_queries > 1
    mask = causal_mask(n_queries, n_cached + n_queries, device)[None] if needs_mask else None
    return mask, n_cached == 0


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return the causal mask [T, S] in which the last query is aligned with the last key."""
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(n_keys - n_queries)


def left_padded_causal_mask(columns_S: Tensor, queries_T: Tensor, padding_B1: Tensor) -> Tensor:
    """Return the causal mask [B, T, S] of rows whose first ``padding_B1`` columns are padding.

    ``columns_S`` are the cache columns of the keys and ``queries_T`` those of the queries; all
    are int64. A padding query attends to itself, as a softmax over no key is undefined.
    """
    is_visible = (columns_S <= queries_T[:, None]) & (columns_S >= padding_B1[..., None])
    return is_visible | (columns_S == queries_T[:, None])


def document_mask(document_BT: Tensor) -> Tensor:
    """Return the causal mask [B, T, T] within documents.

    ``document_BT`` int64 is the number of each token's document in its window.
    """
    place_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    is_same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
    return is_same_BTS & (place_T[:, None] >= place_T)
