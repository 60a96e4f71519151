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


def prefill_distinct(
    model: Llama, prompts: Sequence[Sequence[int]], chunk: int, products: Products
) -> tuple[StaticCache, Tensor, Tensor]:
    """Run prompts, those that are equal once; return cache, logits [B, V], and rows int64 [n].

    The rows are those of the prompts in the other two, whose B rows are padded on the left.
    """
    numbers: dict[tuple[int, ...], int] = {}
    rows = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    longest, weight = max(map(len, numbers)), model.model.embed_tokens.weight
    cache = StaticCache(model.config, len(numbers), longest, weight.dtype, weight.device)
    step = EagerStep(model, cache, products)
    step.begin([longest - len(prompt) for prompt in numbers])
    tokens_BT = left_padded(list(numbers), weight.device)
    return cache, step.prefill(tokens_BT, chunk), torch.tensor(rows, device=weight.device)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return prompts as rows int64 [B, T] of the longest's length, with zeros before the others."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device)
