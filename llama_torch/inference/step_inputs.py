"""The tensors that a captured step reads: written in place, never replaced.

Suffixes: B row, T token of this step, S key position (cache column).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.masks import padded_mask


class StepInputs:
    """Tokens, positions and columns of one step on a device.

    token, position  int64 [B, T]
    column           int64 [T], the cache's columns for the tokens, the same in every row
    columns          int64 [S], all columns, counted from 0
    padding          int64 [B, 1], how many columns of padding a row begins with
    allowed          bool [B, S], columns that are no padding
    """

    def __init__(self, rows: int, size: int, n_tokens: int, device: torch.device) -> None:
        self.n_tokens = n_tokens
        self.token = torch.zeros((rows, n_tokens), dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self.column = torch.arange(n_tokens, device=device)
        self.columns = torch.arange(size, device=device)
        self.padding = self.token[:, :1].clone()
        self.allowed = torch.ones(rows, size, dtype=torch.bool, device=device)

    def begin(self, length: int, padding: Sequence[int]) -> None:
        """Go on at column ``length``, each row after so many columns of padding."""
        self.padding.copy_(torch.tensor(padding)[:, None])
        torch.ge(self.columns, self.padding, out=self.allowed)
        new = length + torch.arange(self.n_tokens, device=self.column.device)
        self.column.copy_(new)
        self.position.copy_((new - self.padding).clamp(min=0))

    def advance(self) -> None:
        """Go on behind the step's tokens."""
        self.position.add_(self.n_tokens)
        self.column.add_(self.n_tokens)

    def mask(self) -> Tensor:
        """Return the mask [B, T, S] on all columns, those not written yet hidden."""
        return padded_mask(self.columns, self.column, self.padding)
