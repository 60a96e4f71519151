"""Prefill, and the decoding step that calls the model without a captured graph.

Suffixes: B row, T query position, S key position (cache column), D dim, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..model.cpu_linear import Products, with_products
from ..model.kv_cache import StaticCache
from ..model.llama import Llama, linear_products
from ..model.masks import left_padded_causal_mask


class EagerStep:
    """The model's forward pass on the columns written so far: a DecodeStep for any batch.

    Prefill uses it in every mode: captured steps have a fixed number of tokens, NumpyStep
    and NativeStep take one at a time. ``products`` computes the blocks' matrix products.
    """

    is_captured = False

    def __init__(
        self, model: Llama, cache: StaticCache, products: Products = linear_products
    ) -> None:
        self.model, self.cache, self.products = model, cache, products
        self.padding: Sequence[int] = ()

    def begin(self, padding: Sequence[int]) -> None:
        """Set the number of padding columns of each row; see DecodeStep."""
        self.padding = padding

    def prefill(self, tokens_BT: Tensor, chunk: int) -> Tensor:
        """Return the logits [B, V] after the last of the tokens, int64 [B, T].

        A forward pass takes ``chunk`` columns, so that its activations fit in memory.
        """
        for part_BT in tokens_BT.split(chunk, dim=1):
            logits_BV = self.model.head(self._hidden(part_BT)[:, -1])
        return logits_BV

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] after one token a row, int64 [B]."""
        return self.prefill(tokens_B[:, None], 1)

    def decode_row(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [T, V] after each of one row's T tokens."""
        row_BT = torch.tensor([tokens], device=self.cache.keys.device)
        return self.model.head(self._hidden(row_BT)[0])

    def close(self) -> None:
        """Do nothing: no step is kept for later requests."""

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        positions_BT, mask_BTS = self._positions_and_mask(tokens_BT.shape[1])
        own = self.products is linear_products
        with nullcontext() if own else with_products(self.model, self.products):
            hidden_BTD, _ = self.model.model(
                tokens_BT, positions=positions_BT, mask=mask_BTS, cache=self.cache
            )
        return hidden_BTD

    def _positions_and_mask(self, n_tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Return positions [B, T] and mask [B, T, S] of the next T columns.

        Both are None, the model's defaults, where no row is padded.
        """
        if not any(self.padding):
            return None, None
        device, start = self.cache.keys.device, self.cache.length
        padding_B1 = torch.tensor(self.padding, device=device)[:, None]
        columns_S = torch.arange(start + n_tokens, device=device)
        positions_BT = (columns_S[start:] - padding_B1).clamp(min=0)
        return positions_BT, left_padded_causal_mask(columns_S, columns_S[start:], padding_B1)
