"""Attention masks: causal, causal with padding on the left, and causal within documents.

A mask is a bool tensor, True where a query may attend to a key. (The Triton kernel ``attend`` of
kernels/decode.py computes ``left_padded_causal_mask`` itself.) Documents stand for the last of them
where attention needs none.
Suffixes: B batch, T query position, S key position (cache column).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


# Not a NamedTuple: FSDP2 would copy every tensor of one to the GPU, ``sizes`` too.
@dataclass(frozen=True)
class Documents:
    """The documents of a packed micro-batch: a causal mask within them, without its T * T elements.

    Shapes depend on the micro-batch's alone, so that compiled code is that of any documents.
    """

    starts: Tensor  # int32 [B * T + 1]: each document's first place in all rows, then B * T alone
    sizes: Tensor  # int64 [2], on the CPU: the number of documents, and the tokens of the longest

    @classmethod
    def from_starts(cls, is_start_BT: Tensor) -> "Documents":
        """Return the documents whose first tokens are given as bool [B, T]; every row has one."""
        first = is_start_BT.flatten().nonzero().squeeze(1)
        n = is_start_BT.numel()
        starts = torch.full((n + 1,), n, dtype=torch.int32, device=is_start_BT.device)
        starts[: len(first)] = first
        longest = int(starts[: len(first) + 1].diff().max())
        return cls(starts, torch.tensor([len(first), longest]))

    def dense(self, n_rows: int) -> Tensor:
        """Return the mask, bool [B, T, T], of ``n_rows`` rows."""
        place = torch.arange(len(self.starts) - 1, dtype=torch.int32, device=self.starts.device)
        return document_mask(torch.searchsorted(self.starts, place, right=True).view(n_rows, -1))

    def padded(self, n_rows: int, n: int) -> "Documents":
        """Return those of rows with ``n`` positions more, which end each row's last document."""
        length = (len(self.starts) - 1) // n_rows
        wide = self.starts + self.starts // length * n
        starts = F.pad(wide, (0, n_rows * n), value=n_rows * (length + n))
        return replace(self, starts=starts, sizes=self.sizes + torch.tensor([0, n]))


Mask = Tensor | Documents


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
