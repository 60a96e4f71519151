"""Read windows of a corpus in an order that the seed fixes, optionally in worker processes."""

import signal
from collections.abc import Generator, Iterator
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from llama_common.errors import InputError

from ..common.torchrun import is_launched
from . import order
from .corpus import Corpus, Tokens

SHOWN = 16  # windows of a bad training step named in the error


class Window(NamedTuple):
    """A window's place in a corpus: ``context`` + 1 tokens from ``start`` of a source."""

    source: int
    start: int


class Windows(Dataset[Tensor]):
    """The training windows of a corpus, each int64 [context + 1], indexed by Window."""

    def __init__(self, corpus: Corpus, context: int) -> None:
        self.parts, self.context = [source.train for source in corpus.sources], context

    def __getitem__(self, window: Window) -> Tensor:
        return _read(self.parts[window.source], window.start, self.context)


def _read(part: Tokens, start: int, context: int) -> Tensor:
    return torch.from_numpy(part[start : start + context + 1].astype(np.int64))


class StepSampler(Sampler[list[Window]]):
    """Yields this rank's windows of training steps ``first`` to ``last`` - 1.

    A step has ``rows`` windows over all ranks. Rank r of ``world`` takes the r-th of ``world``
    equal slices, so that a step reads the same windows in the same order for any number of ranks.
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
        """Return this rank's windows of a training step, a pure function of seed and step."""
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
        """Return the texts and token ranges of this rank's windows of a step, for messages."""
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
    """Yield windows int64 [rows / world, context + 1] for each step of ``range(first, last)``.

    ``workers`` processes read ahead; 0 reads in this process. Raises InputError for data that can
    no longer be read.
    """
    sampler = StepSampler(corpus, context, seed, rows, first, last, rank, world)
    return load_steps(Windows(corpus, context), sampler, workers)


def load_steps(
    windows: Dataset[Tensor], sampler: Sampler[list[Any]], workers: int
) -> Generator[Tensor, None, None]:
    """Yield the windows that the sampler names for each step, stacked to int64 [rows, ...].

    ``workers`` processes read ahead; 0 reads in this process. Raises InputError for data that can
    no longer be read.
    """
    loader = DataLoader(
        windows,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=ignore_signals_in_worker,
    )
    return _unwrap_worker_errors(iter(loader))


def _unwrap_worker_errors(batches: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    """Yield the batches; raise a worker's InputError without the traceback in its message."""
    try:
        yield from batches
        return
    except InputError as error:
        message = str(error)
        error.__traceback__ = None  # one of its frames holds the error, and another the loader
    # The workers end when no reference to the loader is left.
    del batches
    name = f"{InputError.__module__}.{InputError.__qualname__}: "
    raise InputError(message.rpartition(name)[2].strip())


def val_batches(corpus: Corpus, context: int, rows: int, max_batches: int) -> list[Tensor]:
    """Return validation windows int64 [rows, context + 1], the same at every call.

    The last batch may have fewer rows. At most ``max_batches`` batches (0 = no limit) are spread
    evenly over the text. Source i contributes n * share_i windows, where share_i is its normalised
    weight and n the largest number for which every source has enough windows.
    """
    all_starts = [np.arange(0, len(source.val) - context, context) for source in corpus.sources]
    shares = order.shares(corpus.weights)
    n = min(len(starts) // share for starts, share in zip(all_starts, shares, strict=True))
    if max_batches:
        n = min(n, max_batches * rows)
    windows = []
    counts = order.counts(n, corpus.weights)
    for source, starts, count in zip(corpus.sources, all_starts, counts, strict=True):
        spread = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
        windows += [_read(source.val, int(start), context) for start in starts[spread]]
    return [torch.stack(windows[i : i + rows]) for i in range(0, len(windows), rows)]


PATIENCE = 60  # seconds


def ignore_signals_in_worker(worker: int) -> None:
    """Keep a DataLoader worker alive at SIGINT and at the first SIGTERM, for PATIENCE seconds.

    Both go to the whole process group, and the trainer still needs its worker to finish the
    current training step. It then ends the worker by SIGTERM, so a second SIGTERM ends it after a
    second; not in a job, where signals arrive twice (see Stop.signals_are_duplicated).
    """
    n_signals = 0

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal n_signals
        n_signals += 1
        signal.alarm(PATIENCE if n_signals == 1 or is_launched() else 1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
