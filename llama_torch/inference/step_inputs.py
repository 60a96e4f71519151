"""Input tensors of a captured decoding step: written in place, as a graph reads fixed addresses.

Suffixes: B row, T token of this step, S key position (cache column).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.masks import left_padded_causal_mask


class StepInputs:
    """Tokens, positions and cache columns of one decoding step, on its device.

    tokens          int64 [B, T]
    positions       int64 [B, T], the rotary positions
    cache_position  int64 [T], the cache columns of the tokens, the same in every row
    key_positions   int64 [S], all cache columns: 0, 1, ..., S - 1
    padding         int64 [B, 1], the number of padding columns before each row
    key_mask        bool [B, S], False on padding
    """

    def __init__(self, rows: int, size: int, n_tokens: int, device: torch.device) -> None:
        self.n_tokens = n_tokens
        self.tokens = torch.zeros((rows, n_tokens), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.cache_position = torch.arange(n_tokens, device=device)
        self.key_positions = torch.arange(size, device=device)
        self.padding = self.tokens[:, :1].clone()
        self.key_mask = torch.ones(rows, size, dtype=torch.bool, device=device)

    def begin(self, length: int, padding: Sequence[int]) -> None:
        """Continue at column ``length``; row i has ``padding[i]`` columns of padding."""
        self.padding.copy_(torch.tensor(padding)[:, None])
        torch.ge(self.key_positions, self.padding, out=self.key_mask)
        new = length + torch.arange(self.n_tokens, device=self.cache_position.device)
        self.cache_position.copy_(new)
        self.positions.copy_((new - self.padding).clamp(min=0))

    def advance(self) -> None:
        """Move the positions on by the step's number of tokens."""
        self.positions.add_(self.n_tokens)
        self.cache_position.add_(self.n_tokens)

    def mask(self) -> Tensor:
        """Return the causal mask [B, T, S] over all columns; those not yet written are hidden."""
        return left_padded_causal_mask(self.key_positions, self.cache_position, self.padding)
