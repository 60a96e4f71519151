"""Pack conversations into windows, and order the windows: functions of lengths, seed and step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from .order import ROUNDS, Indices, permute

EMPTY = -1  # the number of a window without a conversation


def pack(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Return the numbers of the conversations in each window of ``context`` positions.

    lengths  positions of each conversation, from 1 to ``context``.

    The longest come first, each into the fullest window that has room for it (best-fit decreasing).
    """
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context + 1)]  # windows by their free positions
    has_room = 0  # bit r is set where a window has r free positions
    for i in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length, room = lengths[i], context
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = by_room[room].pop()
            has_room &= ~(1 << room) if not by_room[room] else -1
            windows[window].append(i)
        else:
            window = len(windows)
            windows.append([i])
        if room > length:
            by_room[room - length].append(window)
            has_room |= 1 << room - length
    return windows


def window_numbers(n_windows: int, seed: int, indices: Indices) -> Indices:
    """Return the windows [N] that a run reads as its ``indices`` [N]: each once in every epoch."""
    epochs, places = np.divmod(indices, n_windows)
    numbers = np.empty_like(places)
    for epoch in np.unique(epochs):
        keys = np.random.SeedSequence([seed, int(epoch)]).generate_state(ROUNDS, np.uint64)
        here = epochs == epoch
        numbers[here] = permute(places[here], n_windows, keys.astype(np.uint64))
    return numbers


class PackedSampler(Sampler[list[int]]):
    """Yields the numbers of one rank's windows of training steps ``first`` to ``last`` - 1.

    A step has ``rows`` windows over all ranks, and rank r of ``world`` takes the r-th of ``world``
    equal slices. After ``n_read`` windows there are no more: the step that reaches them has as
    many as are left, and EMPTY ones for the ranks that these do not reach.
    """

    def __init__(
        self,
        n_windows: int,
        n_read: int,
        seed: int,
        rows: int,
        first: int,
        last: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert rows % world == 0
        assert 0 <= rank < world
        self.n_windows, self.n_read, self.seed, self.rows = n_windows, n_read, seed, rows
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def windows(self, step: int) -> list[int]:
        """Return this rank's windows of a training step, a pure function of seed and step."""
        start = step * self.rows
        n_real = min(self.rows, self.n_read - start)
        indices = np.arange(start, start + n_real, dtype=np.int64)
        numbers = window_numbers(self.n_windows, self.seed, indices).tolist()
        numbers += [EMPTY] * (-n_real % self.world)
        share = len(numbers) // self.world
        return numbers[self.rank * share : (self.rank + 1) * share]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.windows, range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Epochs:
    """The windows that a run reads: all of them in each epoch, in an order of its own."""

    n_windows: int
    epochs: int
    rows: int  # windows of a step, over all ranks
    asked: int  # steps that were asked for; 0 = as many as the epochs take
    seed: int

    @property
    def n_read(self) -> int:
        """The number of windows in all epochs."""
        return self.epochs * self.n_windows

    @property
    def steps(self) -> int:
        """The run's length in training steps."""
        return self.asked or -(-self.n_read // self.rows)

    def sampler(self, first: int, last: int, rank: int = 0, world: int = 1) -> PackedSampler:
        """Return the sampler of one rank's windows of training steps ``first`` to ``last`` - 1.

        The last step of the epochs takes what is left of them; that of another length is whole.
        """
        is_other = self.steps != -(-self.n_read // self.rows)
        n_read = self.steps * self.rows if is_other else self.n_read
        return PackedSampler(self.n_windows, n_read, self.seed, self.rows, first, last, rank, world)
