"""Pairs of answers as a run's data. Implements BatchSource.

Suffixes: R windows (pairs), B rows (two of each pair), W tokens of the longest row.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from llama_common.errors import InputError

from ..common.device import pick_device
from ..data.loader import load_steps
from ..data.packing import EMPTY, Epochs
from ..distributed.job import broadcast_object
from ..finetuning_config import RewardConfig
from ..tokenizer.loading import load_tokenizer
from .batch import Batch
from .origin import Origin
from .pair_loading import LoadedPairs, Pairs, count_strengths, load_pairs
from .pair_objective import Column
from .prompt import Prompt
from .run_length import describe_length

SHAPES = 4  # widths of compiled micro-batches, at most: torch.compile compiles a block for each
UNIT = 8  # widths are multiples of it
MOST_LENGTHS = 64  # that the widths are chosen from
NAMED = 16  # pairs of a bad training step that its error names


class PairWindows(Dataset[Tensor]):
    """Pairs as windows, int64 [2, 4 + W]: of each row the values of Column, then its tokens.

    Rows are padded on the right. Attention is causal, so that no token of a row sees its padding,
    and nothing else is needed for the score at its last token to be that of the row alone.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.width = pairs, int(pairs.lengths.max())

    def __len__(self) -> int:
        return len(self.pairs.places)

    def __getitem__(self, number: int) -> Tensor:
        window = np.zeros((2, len(Column) + self.width), dtype=np.int64)
        window[:, Column.LAST], window[:, Column.SAFE] = -1, -1
        if number != EMPTY:
            for side, row in enumerate((2 * number, 2 * number + 1)):
                tokens = self.pairs.tokens[self.pairs.starts[row] : self.pairs.starts[row + 1]]
                window[side, Column.LAST] = len(tokens) - 1
                window[side, Column.LAST + 1 : len(Column)] = self.pairs.columns[row]
                window[side, len(Column) : len(Column) + len(tokens)] = tokens
        return torch.from_numpy(window)


def pair_batch(windows: Tensor, widths: Sequence[int] = ()) -> Batch:
    """Return windows [R, 2, 4 + W] as a micro-batch: tokens [B, T], targets [B, 4]; see Column.

    T is the least of ``widths`` that the longest row fits; without them its length, rounded up.
    """
    rows = windows.flatten(0, 1)
    targets, tokens = rows.tensor_split([len(Column)], dim=1)
    longest = int(targets[:, Column.LAST].max()) + 1
    fitting = (width for width in widths if width >= longest)
    return Batch(tokens[:, : next(fitting, max(1, -(-longest // UNIT)) * UNIT)], targets)


def least_padded_widths(longest: NDArray[np.int64], most: int = SHAPES) -> list[int]:
    """Return at most ``most`` widths, ascending, for pairs whose longest rows are ``longest`` [P].

    They are those of multiples of UNIT with which all pairs, each of the least width that it fits,
    have the fewest tokens, padding included; of many lengths, of quantiles of them.
    """
    rounded = -(-longest // UNIT) * UNIT
    of_many = np.quantile(rounded, np.linspace(0, 1, MOST_LENGTHS), method="higher")
    lengths = np.unique(of_many)
    below = np.searchsorted(np.sort(rounded), lengths, side="right")  # pairs of at most a length
    # For the pairs of at most each length: the tokens with the best widths so far, and these.
    tokens, chosen = below * lengths, [[int(length)] for length in lengths]
    for _ in range(most - 1):
        for j in reversed(range(len(lengths))):  # so that all before it have a width less
            for i in range(j):
                found = tokens[i] + (below[j] - below[i]) * lengths[j]
                if found < tokens[j]:
                    tokens[j], chosen[j] = found, [*chosen[i], int(lengths[j])]
    return chosen[-1]


def pair_batches(pairs: Pairs, rows: int, most: int = 0) -> list[Tensor]:
    """Return windows [R, 2, 4 + W] of ``rows`` pairs each, the longest pairs first.

    At most ``most`` of them (0 = all), spread evenly over the pairs.
    """
    windows = PairWindows(pairs)
    n = min(len(windows), most * rows) if most else len(windows)
    numbers = np.linspace(0, len(windows) - 1, n).astype(int).tolist()
    longest = pairs.lengths.reshape(-1, 2).max(1)
    numbers.sort(key=lambda number: -int(longest[number]))
    each = [windows[number] for number in numbers]
    return [torch.stack(each[i : i + rows]) for i in range(0, n, rows)]


@dataclass(frozen=True)
class PairSource:
    """Windows of pairs, int64 [R, 2, 4 + W]."""

    config: RewardConfig
    loaded: LoadedPairs

    @cached_property
    def windows(self) -> PairWindows:
        """The training windows."""
        return PairWindows(self.loaded.train)

    @cached_property
    def widths(self) -> Sequence[int]:
        """The widths of micro-batches; empty = any, as blocks are not compiled."""
        mode = self.config.compile
        if mode == "no" or (mode == "auto" and pick_device(self.config.device).type != "cuda"):
            return ()
        both = (pairs.lengths.reshape(-1, 2).max(1) for pairs in self.loaded[:2])
        return least_padded_widths(np.concatenate([*both]))

    @cached_property
    def key(self) -> str:
        """The hash of all tokens, strengths and tags, held-out ones too."""
        digest = hashlib.sha256()
        for pairs in self.loaded[:2]:
            for array in (pairs.tokens, pairs.starts, pairs.columns):
                digest.update(f"{array.size} ".encode() + array.tobytes())
        return digest.hexdigest()[:32]

    @property
    def epochs(self) -> Epochs:
        """The windows that the run reads."""
        config = self.config
        rows = config.windows_per_step
        return Epochs(len(self.windows), config.epochs, rows, config.steps, config.seed)

    @property
    def steps(self) -> int:
        """The run's length: --steps, or as many as --epochs take."""
        return self.epochs.steps

    @property
    def learnt_share(self) -> float:
        """All: a reward model has no head over a vocabulary to spare."""
        return 1.0

    @property
    def directory_files(self) -> Mapping[str, str]:
        """config.json of the reward model, and the chat template where it is not the origin's."""
        return self.loaded.directory_files

    def describe(self) -> Sequence[str]:
        """Return lines on numbers of pairs and tokens, and where scores are read."""
        config, (train, val) = self.config, self.loaded[:2]
        rows = config.windows_per_step
        length = describe_length(config.epochs, len(self.windows), self.steps, rows)
        few = ": a smaller --grad-accum makes more" if self.epochs.n_read < 2 * rows else ""
        return [
            f"{', '.join(config.data.data)}: {len(train.places):,} pairs, {len(val.places):,} "
            f"held out; conversations of {train.lengths.min():,} to {train.lengths.max():,} "
            f"tokens, {train.lengths.mean():,.0f} on average",
            f"of them {count_strengths(train)}",
            f"{length} pairs{few}",
            *self.loaded.lines,
        ]

    def train_windows(
        self, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Generator[Tensor, None, None]:
        """Yield one rank's windows of each training step, the longest pairs first.

        Pairs of nearly one length come into one micro-batch, which then has little padding.
        """
        sampler = self.epochs.sampler(first, last, rank, world)
        with closing(load_steps(self.windows, sampler, self.config.data.num_workers)) as steps:
            for windows in steps:
                longest = windows[:, :, Column.LAST].amax(1)
                yield windows[longest.argsort(descending=True, stable=True)]

    def describe_step(self, step: int) -> str:
        """Return the places of a step's pairs."""
        numbers = self.epochs.sampler(step, step + 1).windows(step)
        places = [self.loaded.train.places[i] for i in numbers if i != EMPTY]
        return ", ".join(places[:NAMED]) + (", ..." if len(places) > NAMED else "")

    def validation_windows(self) -> list[Tensor]:
        """Return the windows of each validation batch, the longest pairs first."""
        return pair_batches(self.loaded.val, self.config.batch_size, self.config.eval_batches)

    def example_windows(self) -> Tensor:
        """Return the windows of a whole step; some twice if there are few."""
        rows, n = self.config.windows_per_step, len(self.windows)
        windows = torch.stack([self.windows[i % n] for i in range(rows)])
        longest = windows[:, :, Column.LAST].amax(1)
        return windows[longest.argsort(descending=True, stable=True)]

    def to_batch(self, windows: Tensor) -> Batch:
        """Return windows as a micro-batch of rows."""
        return pair_batch(windows, self.widths)

    def prompt(self) -> Prompt:
        """Refuse: there are no samples."""
        raise InputError("--sample-every: a reward model writes no text; leave it out")


def open_pairs(config: RewardConfig, origin: Origin) -> PairSource:
    """Read and tokenise a run's pairs; the main process alone reads them.

    Raises InputError for pairs, a template or a tokenizer that cannot be learnt from.
    """
    # A run that goes on has all that it needs in its own directory, the chat template too.
    directory = origin.directory or Path(config.out)
    template = config.data.template if origin.directory else ""
    tokenizer = load_tokenizer(directory, config.model.vocab_size)
    loaded = broadcast_object(
        lambda: load_pairs(config, origin.model, directory, tokenizer, template)
    )
    return PairSource(config, loaded)
