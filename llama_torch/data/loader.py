"""Read windows of a corpus in a fixed order, in worker processes where asked to."""

import signal
from collections.abc import Generator, Iterator
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..common.errors import InputError
from ..common.torchrun import is_launched
from . import order
from .corpus import Corpus, Tokens

SHOWN = 16  # windows of a bad step that are named


class Window(NamedTuple):
    """Where a window is read: ``context`` + 1 tokens from ``start`` of a source."""

    source: int
    start: int


class Windows(Dataset[Tensor]):
    """A corpus's training windows, each int64 [context + 1], indexed by where they are."""

    def __init__(self, corpus: Corpus, context: int) -> None:
        self.parts, self.context = [source.train for source in corpus.sources], context

    def __getitem__(self, window: Window) -> Tensor:
        return _read(self.parts[window.source], window.start, self.context)


def _read(part: Tokens, start: int, context: int) -> Tensor:
    return torch.from_numpy(part[start : start + context + 1].astype(np.int64))


class StepSampler(Sampler[list[Window]]):
    """The windows of each step from ``first`` on; ``rows`` windows a step on all ranks together.

    Rank r of ``world`` has the r-th of ``world`` equal stretches of them, so that a step reads
    the same windows in the same order whatever the number of ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        seed: int,
        rows: int,
        first: int,
        last: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert rows % world == 0
        assert 0 <= rank < world
        self.corpus, self.context, self.seed = corpus, context, seed
        self.first, self.last, self.rows = first, last, rows
        self.mine = slice(rank * rows // world, (rank + 1) * rows // world)

    def windows(self, step: int) -> list[Window]:
        """Return this rank's windows of a step: a pure function of the seed and the step."""
        weights = self.corpus.weights
        indices = range(step * self.rows, (step + 1) * self.rows)[self.mine]
        found = np.array([order.source_of(index, weights) for index in indices], dtype=np.int64)
        sources, places = found.T
        starts = np.empty_like(places)
        for source in np.unique(sources):
            of_it, n_tokens = sources == source, len(self.corpus.sources[source].train)
            where = (n_tokens, self.context, self.seed, places[of_it], int(source))
            starts[of_it] = order.window_starts(*where)
        return [Window(*pair) for pair in zip(sources.tolist(), starts.tolist(), strict=True)]

    def describe(self, step: int) -> str:
        """Name this rank's windows of a step for people: the text, and which of its tokens."""
        found: dict[int, list[str]] = {}
        for source, start in self.windows(step):
            found.setdefault(source, []).append(f"{start}-{start + self.context}")
        return "; ".join(
            f"{self.corpus.sources[source].name}: training tokens {', '.join(spans[:SHOWN])}"
            + (", ..." if len(spans) > SHOWN else "")
            for source, spans in found.items()
        )

    def __iter__(self) -> Iterator[list[Window]]:
        return map(self.windows, range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def train_batches(
    corpus: Corpus,
    context: int,
    *,
    seed: int,
    rows: int,
    first: int,
    last: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> Generator[Tensor, None, None]:
    """Yield int64 [rows / world, context + 1] for every step of ``range(first, last)``."""
    sampler = StepSampler(corpus, context, seed, rows, first, last, rank, world)
    loader = DataLoader(
        Windows(corpus, context),
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=leave_to_parent,
    )
    return _plainly(iter(loader))


def _plainly(batches: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    """Yield the batches; of a loader's process, an InputError without the traceback in it."""
    try:
        yield from batches
        return
    except InputError as error:
        message = str(error)
        error.__traceback__ = None  # one of its frames holds the error, and another the loader
    # Nothing may hold the loader any more, whose processes end when it does.
    del batches
    name = f"{InputError.__module__}.{InputError.__qualname__}: "
    raise InputError(message.rpartition(name)[2].strip())


def val_batches(corpus: Corpus, context: int, rows: int, most: int) -> list[Tensor]:
    """Return validation windows, the same each time: all, or ``most`` batches spread out.

    Of several sources each has its weight's share of them: all of the one that is short of its
    share, and of the others as many as go with that.
    """
    all_starts = [np.arange(0, len(source.val) - context, context) for source in corpus.sources]
    shares = order.shares(corpus.weights)
    n = min(len(starts) // share for starts, share in zip(all_starts, shares, strict=True))
    if most:
        n = min(n, most * rows)
    windows = []
    counts = order.counts(n, corpus.weights)
    for source, starts, count in zip(corpus.sources, all_starts, counts, strict=True):
        spread = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
        windows += [_read(source.val, int(start), context) for start in starts[spread]]
    return [torch.stack(windows[i : i + rows]) for i in range(0, len(windows), rows)]


PATIENCE = 60  # seconds


def leave_to_parent(worker: int) -> None:
    """Outlive both signals in a data worker: a group is sent them, and its trainer needs it yet.

    That one finishes the step in hand, and ends the worker: with SIGTERM, and again when it ends
    itself, if it must. Hence a second one is obeyed, but not in a job (see
    Stop.signals_are_duplicated).
    """
    heard = 0

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        signal.alarm(PATIENCE if heard == 1 or is_launched() else 1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
