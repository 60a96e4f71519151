"""Ports with bugs that no short sequence shows."""

from typing import Any

import numpy as np

from .toy_ports import Engine, Small


class Window(Small):
    """Attention to the last 32 keys alone."""

    def run(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, past: Any = None
    ) -> Any:
        place = np.arange(tokens.shape[1])
        behind = place[:, None] - place
        mask = ((behind >= 0) & (behind < 32))[None]
        return super().run(config, params, tokens, positions, mask, past)


class Bfloat16Positions(Small):
    """Positions in bfloat16, which holds the integers to 256."""

    def next_positions(self, start: int, length: int) -> Any:
        positions = super().next_positions(start, length)
        step = 2 ** np.maximum(0, np.floor(np.log2(np.maximum(positions, 1))) - 7)
        return np.rint(positions / step) * step


class EngineOf128Keys(Engine):
    """An engine whose cache loses its first key at the 129th token."""

    def continued(self, rows: Any) -> Any:
        for past in self.pasts:
            for i, pair in enumerate(past):
                if pair is not None and pair[0].shape[1] > 128:
                    kept = np.arange(pair[0].shape[1]) > 0
                    past[i] = tuple(part * kept[None, :, None, None] for part in pair)
        return super().continued(rows)
