"""Bugs in reading a call's arguments: the oracle that ignores positions, or some of a mask.

They are of no operation, and so not among the known bugs of reference_np/mutants.py; a failure is
compared with them too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reference_np import ops
from reference_np.backend import Array, Params
from reference_np.config import LlamaConfig
from reference_np.grad import Batch
from reference_np.model import Cache

from .oracle import Oracle

Read = Callable[[Array | None], Array | None]  # from the argument to what is read of it


def _as_it_is(value: Array | None) -> Array | None:
    return value


def _nothing(value: Array | None) -> None:
    return None


def _in_a_mask(read: Callable[[Array], Array]) -> Read:
    return lambda mask: None if mask is None else read(mask)


def _with_causal(mask: Array) -> Array:
    return mask & ops.causal_mask(*mask.shape[1:])


def _of_first_row(mask: Array) -> Array:
    return np.repeat(mask[:1], len(mask), axis=0)


def _of_keys(mask: Array) -> Array:
    """Return the causal mask of the keys that the last query sees; each query sees itself."""
    n_queries, n_keys = mask.shape[1:]
    itself = np.arange(n_keys) == np.arange(n_keys - n_queries, n_keys)[:, None]
    return _with_causal(mask[:, -1:] | itself)


class Ignoring(Oracle):
    """The oracle that reads positions and masks by functions of them."""

    def __init__(self, positions: Read = _as_it_is, mask: Read = _as_it_is) -> None:
        super().__init__()
        self._positions, self._mask = positions, mask

    def decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache]:
        read = self._positions(positions), self._mask(mask)
        return super().decode(config, params, tokens, *read, cache)

    def traced_decode(
        self,
        config: LlamaConfig,
        params: Params,
        tokens: Array,
        positions: Array | None,
        mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Mapping[str, Array], Cache]:
        read = self._positions(positions), self._mask(mask)
        return super().traced_decode(config, params, tokens, *read, cache)

    def loss_and_grads(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], z_loss: float
    ) -> tuple[float, Mapping[str, Array]]:
        return super().loss_and_grads(config, params, self._read(batches), z_loss)

    def train(
        self, config: LlamaConfig, params: Params, batches: Sequence[Batch], *rest: Any
    ) -> Mapping[str, Any]:
        return super().train(config, params, self._read(batches), *rest)

    def _read(self, batches: Sequence[Batch]) -> list[Batch]:
        return [
            batch._replace(positions=self._positions(batch.positions), mask=self._mask(batch.mask))
            for batch in batches
        ]


# Name -> the sentence and the oracle with the bug.
IGNORED: Mapping[str, tuple[str, Ignoring]] = {
    "mask_ignored": (
        "the mask that is given is ignored: attention is causal alone",
        Ignoring(mask=_nothing),
    ),
    "positions_ignored": (
        "the positions that are given are ignored: they count from the cache",
        Ignoring(positions=_nothing),
    ),
    "mask_and_positions_ignored": (
        "the mask and the positions that are given are ignored",
        Ignoring(_nothing, _nothing),
    ),
    "mask_cut_to_causal": (
        "later keys that the mask allows are not attended to",
        Ignoring(mask=_in_a_mask(_with_causal)),
    ),
    "mask_of_the_first_row": (
        "every row has the first row's mask",
        Ignoring(mask=_in_a_mask(_of_first_row)),
    ),
    "mask_of_keys_alone": (
        "the mask is read as one of padding: its last query's, causal",
        Ignoring(mask=_in_a_mask(_of_keys)),
    ),
}
