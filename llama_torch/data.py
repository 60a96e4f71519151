"""From text to batches: what is trained on, and its windows in a fixed order.

``python -m llama_torch.data --data texts/ --out DIR`` tokenises text beforehand.
"""

import hashlib
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import cli, order
from .config import DataConfig, InputError, PrepareConfig
from .documents import find_files, identify
from .shards import Shards, damaged_shards, is_shards, prepare
from .stopping import leave_to_parent
from .tokenizer import VOCAB_SIZE

HELP_TOPICS = "Python's help topics (built in)"
SHOWN = 16  # windows of a bad step that are named


class Tokens(Protocol):
    """A sequence of token ids; a slice of it is an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> NDArray[np.integer[Any]]: ...


class Part:
    """The ids of ``tokens[start:stop]``, not yet read."""

    def __init__(self, tokens: Tokens, start: int, stop: int) -> None:
        self.tokens, self.start, self.stop = tokens, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, where: slice) -> NDArray[np.integer[Any]]:
        start, stop, _ = where.indices(len(self))
        return self.tokens[self.start + start : self.start + stop]


@dataclass(frozen=True)
class Source:
    """Token ids of one text, split in two."""

    train: Tokens
    val: Tokens
    name: str  # for people


@dataclass(frozen=True)
class Corpus:
    """What is trained on: one source, or several that share the windows by their weights."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]  # of each source; any positive numbers
    key: str  # hash of the content and of the encoding


class Window(NamedTuple):
    """Where a window is read: ``context`` + 1 tokens from ``start`` of a source."""

    source: int
    start: int


def load_corpus(config: DataConfig, vocab_size: int, context: int) -> Corpus:
    """Open the configured texts, tokenised now unless they were before, and split each.

    Raises InputError for text that cannot be read, token ids outside the vocabulary, and a
    train or validation part shorter than one window of ``context`` + 1 tokens.
    """
    names = [(name,) for name in config.data] if config.weights else [config.data]
    shards = [_open(config, patterns) for patterns in names]
    sources = []
    for patterns, tokens in zip(names, shards, strict=True):
        name = ", ".join(patterns) or HELP_TOPICS
        _require_in_vocabulary(tokens, vocab_size, name)
        n_train = len(tokens) - int(len(tokens) * config.val_fraction)
        train, val = Part(tokens, 0, n_train), Part(tokens, n_train, len(tokens))
        for part, kind in ((train, "training"), (val, "validation")):
            _require_long_enough(part, context, f"{kind} part of {name}")
        sources.append(Source(train, val, name))
    keys = [tokens.index.key for tokens in shards]
    key = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:32] if config.weights else keys[0]
    return Corpus(tuple(sources), config.weights or (1.0,), key)


def _open(config: DataConfig, patterns: Sequence[str]) -> Shards:
    """Return what ``patterns`` name: a folder of shards, or text and its shards in the cache."""
    folders = [name for name in patterns if name and is_shards(Path(name))]
    if folders and len(patterns) > 1:
        raise InputError(
            f"--data {folders[0]} holds token shards and cannot be joined to other text; leave "
            "it alone, or say with --weights how to mix them"
        )
    if folders:
        return Shards(Path(folders[0]))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(config.cache_dir) if config.cache_dir else home / "llama_torch"
    text = identify(find_files(patterns), config.text_field)
    return prepare(text, cache / text.key)


def _require_in_vocabulary(tokens: Shards, vocab_size: int, name: str) -> None:
    highest = tokens.index.highest
    if highest >= vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is too small: {name} holds token id {highest}; "
            f"use at least {highest + 1} (the GPT-2 encoding has {VOCAB_SIZE})"
        )


def _require_long_enough(part: Tokens, context: int, name: str) -> None:
    if len(part) < context + 1:
        raise InputError(
            f"--max-seq-len {context} needs {context + 1} tokens and the {name} has {len(part)}; "
            "give more text with --data, or change --max-seq-len or --val-fraction"
        )


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


def describe(corpus: Corpus) -> str:
    """Return one line about the corpus for people."""
    return "; ".join(
        (f"{float(share):.1%} " if len(corpus.sources) > 1 else "")
        + f"{source.name}: {len(source.train):,} training tokens, {len(source.val):,} held out"
        for source, share in zip(corpus.sources, order.shares(corpus.weights), strict=True)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(PrepareConfig, argv)
    if config.verify:
        return _verify(Shards(Path(config.verify)))
    started = time.perf_counter()
    text = identify(find_files(config.data), config.text_field)
    shards = prepare(text, Path(config.out), config.workers, config.shard_tokens)
    print(
        f"{config.out}: {len(shards):,} tokens in {len(shards.index.shards)} shards of "
        f"{shards.index.dtype}, after {time.perf_counter() - started:.0f} s\n"
        f"next:\n  python -m llama_torch.train --data {config.out}"
    )
    return 0


def _verify(shards: Shards) -> int:
    damaged = damaged_shards(shards)
    for name in damaged:
        print(f"{shards.folder / name}: is not what was written; its checksum differs")
    n_shards = len(shards.index.shards)
    print(f"{shards.folder}: {n_shards - len(damaged)} of {n_shards} shards are as written")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
