"""Conversations as a run's data: their answers are learnt. Implements BatchSource."""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..data.loader import load_steps
from ..data.packing import Epochs
from ..distributed.job import broadcast_object
from ..finetuning_config import SftConfig
from ..tokenizer.loading import load_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .batch import Batch
from .conversation_loading import Loaded, load_conversations
from .labels import PackedWindows, packed_batch
from .origin import Origin
from .prompt import Prompt
from .run_length import describe_length


@dataclass(frozen=True)
class ConversationSource:
    """Windows of packed conversations, int64 [rows, 3, T]."""

    config: SftConfig
    loaded: Loaded
    tokenizer: Tokenizer

    @cached_property
    def windows(self) -> PackedWindows:
        """The training windows."""
        return PackedWindows(self.loaded.train, self.config.model.max_seq_len)

    @cached_property
    def key(self) -> str:
        """The hash of all tokens and targets, held-out ones too."""
        digest = hashlib.sha256()
        for examples in (self.loaded.train, self.loaded.val):
            for array in (examples.tokens, examples.targets, examples.starts):
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
        """The share of the windows' positions whose next token is of an answer."""
        return self.loaded.train.n_learnt / (len(self.windows) * self.config.model.max_seq_len)

    @property
    def directory_files(self) -> Mapping[str, str]:
        """The chat template where it is not the origin's, and end tokens that it did not name."""
        return self.loaded.directory_files

    def describe(self) -> Sequence[str]:
        """Return lines on numbers of conversations, tokens and windows, and what is learnt."""
        config, (train, val) = self.config, self.loaded[:2]
        n, learnt, windows = len(train.tokens), train.n_learnt, len(self.windows)
        rows = config.windows_per_step
        length = describe_length(config.epochs, windows, self.steps, rows)
        lines = [
            f"{', '.join(config.data.data)}: {len(train):,} conversations, {len(val):,} held out; "
            f"{n:,} tokens, of which {learnt:,} are learnt ({learnt / n:.1%})",
            f"{windows:,} windows of {config.model.max_seq_len:,} tokens, {self.windows.fill:.1%} "
            f"full; {length} windows"
            + (": a smaller --grad-accum makes more" if self.epochs.n_read < 2 * rows else ""),
        ]
        return [*lines, *self.loaded.lines]

    def train_windows(
        self, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Generator[Tensor, None, None]:
        """Yield one rank's windows, int64 [rows / world, 3, T], of each training step."""
        sampler = self.epochs.sampler(first, last, rank, world)
        return load_steps(self.windows, sampler, self.config.data.num_workers)

    def describe_step(self, step: int) -> str:
        """Return the numbers of the conversations in a step's windows."""
        windows = self.epochs.sampler(step, step + 1).windows(step)
        members = [str(1 + i) for window in windows for i in self.windows.members[window]]
        n = f"{len(members)} conversations of {', '.join(self.config.data.data)}"
        return f"{n}: number {', '.join(members[:16])}" + (", ..." if len(members) > 16 else "")

    def validation_windows(self) -> list[Tensor]:
        """Return the windows of each validation batch, int64 [rows, 3, T]."""
        windows = PackedWindows(self.loaded.val, self.config.model.max_seq_len)
        return [*windows.batches(self.config.batch_size, self.config.eval_batches)]

    def example_windows(self) -> Tensor:
        """Return the windows of a whole step, int64 [rows, 3, T]; some twice if there are few."""
        rows = self.config.windows_per_step
        return torch.stack([self.windows[i % len(self.windows)] for i in range(rows)])

    def to_batch(self, windows: Tensor) -> Batch:
        """Return windows as a micro-batch, in which conversations are on their own."""
        return packed_batch(windows)

    def prompt(self) -> Prompt:
        """Return the prompt that the samples answer."""
        return Prompt(*self.loaded.prompt, self.tokenizer, self.loaded.end_ids)


def open_conversations(config: SftConfig, origin: Origin) -> ConversationSource:
    """Read, label and pack a run's conversations; the main process alone reads them.

    Raises InputError for conversations, a template or a tokenizer that cannot be learnt from.
    """
    # A run that goes on has all that it needs in its own directory, the chat template too.
    directory = origin.directory or Path(config.out)
    template = config.data.template if origin.directory else ""
    tokenizer = load_tokenizer(directory, config.model.vocab_size)
    loaded = broadcast_object(lambda: load_conversations(config, directory, tokenizer, template))
    return ConversationSource(config, loaded, tokenizer)
