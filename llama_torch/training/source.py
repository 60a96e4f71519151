"""Where a run's windows come from: the seam between the training loop and what is learnt.

The loop asks a BatchSource for windows, tensors whose first axis is the window, splits them into
micro-batches and hands these to ``to_batch``. All that it learns of the data is a Batch's targets.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import RunConfig, TrainConfig
from ..data.corpus import Corpus, describe, load_corpus
from ..data.loader import StepSampler, train_batches, val_batches
from ..distributed.parallel import Parallel
from ..finetuning_config import RewardConfig, SftConfig
from ..tokenizer.encoding import TextEncoding
from ..tokenizer.gpt2 import located
from .batch import Batch, batch_function
from .conversation_source import open_conversations
from .origin import Origin
from .pair_source import open_pairs
from .prompt import Prompt


class BatchSource(Protocol):
    """Supplies a run's windows and micro-batches; the same in every process of a job."""

    @property
    def key(self) -> str:
        """The hash of all that determines the windows, which a resumed run must share."""
        ...

    @property
    def steps(self) -> int:
        """The run's length in training steps."""
        ...

    @property
    def learnt_share(self) -> float:
        """The share of the tokens that a language model's loss takes as targets; 1 = all."""
        ...

    @property
    def directory_files(self) -> Mapping[str, str]:
        """Texts of files of the run directory, by name, in place of the origin's."""
        ...

    def describe(self) -> Sequence[str]:
        """Return lines on the data, printed before the first step."""
        ...

    def train_windows(
        self, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Generator[Tensor, None, None]:
        """Yield one rank's windows of each of the training steps ``first`` to ``last`` - 1."""
        ...

    def describe_step(self, step: int) -> str:
        """Return what a training step, counted from 0, reads, for an error's message."""
        ...

    def validation_windows(self) -> Sequence[Tensor]:
        """Return the windows of each validation batch, of the same data at every call."""
        ...

    def example_windows(self) -> Tensor:
        """Return windows of the shape of a whole training step's, for --dry-run."""
        ...

    def to_batch(self, windows: Tensor) -> Batch:
        """Return windows as a micro-batch."""
        ...

    def prompt(self) -> Prompt:
        """Return what the samples continue."""
        ...


@dataclass(frozen=True)
class TextSource:
    """Windows of a text, int64 [rows, T + 1]: every token is learnt. Implements BatchSource."""

    config: TrainConfig
    corpus: Corpus
    encoding: TextEncoding  # of the corpus and of samples
    split: Callable[[Tensor], Batch]  # windows [B, T + 1] to tokens and targets [B, T]

    @property
    def key(self) -> str:
        """The hash of the text and of its encoding."""
        return self.corpus.key

    @property
    def steps(self) -> int:
        """The run's length in training steps."""
        return self.config.steps

    @property
    def learnt_share(self) -> float:
        """Every token."""
        return 1.0

    @property
    def directory_files(self) -> Mapping[str, str]:
        """No files: the run directory has the origin's."""
        return {}

    def describe(self) -> Sequence[str]:
        """Return a line on the texts and their numbers of tokens."""
        return [describe(self.corpus)]

    def train_windows(
        self, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Generator[Tensor, None, None]:
        """Yield one rank's windows, int64 [rows / world, T + 1], of each training step."""
        config = self.config
        return train_batches(
            self.corpus,
            config.model.max_seq_len,
            seed=config.seed,
            rows=config.windows_per_step,
            first=first,
            last=last,
            workers=config.data.num_workers,
            rank=rank,
            world=world,
        )

    def describe_step(self, step: int) -> str:
        """Return the texts and token ranges of a step's windows."""
        config = self.config
        context, rows = config.model.max_seq_len, config.windows_per_step
        sampler = StepSampler(self.corpus, context, config.seed, rows, step, step + 1)
        return sampler.describe(step)

    def validation_windows(self) -> list[Tensor]:
        """Return held-out windows, int64 [rows, T + 1] each."""
        config = self.config
        context, rows = config.model.max_seq_len, config.batch_size
        return val_batches(self.corpus, context, rows, config.eval_batches)

    def example_windows(self) -> Tensor:
        """Return windows of random ids, int64 [rows, T + 1]."""
        model = self.config.model
        generator = torch.Generator().manual_seed(self.config.seed)
        shape = self.config.windows_per_step, model.max_seq_len + 1
        return torch.randint(model.vocab_size, shape, generator=generator)

    def to_batch(self, windows: Tensor) -> Batch:
        """Return windows as a micro-batch of tokens and their next ones."""
        return self.split(windows)

    def prompt(self) -> Prompt:
        """Return --sample-prompt as the beginning of a document."""
        text = self.config.sample_prompt
        with located("--sample-prompt"):
            return Prompt(text, self.encoding.prompt_ids(text), self.encoding.tokenizer)


def open_source(config: RunConfig, origin: Origin, parallel: Parallel) -> BatchSource:
    """Open the data of a run; InputError for data that cannot be read or holds too little."""
    if isinstance(config, SftConfig):
        return open_conversations(config, origin)
    if isinstance(config, RewardConfig):
        return open_pairs(config, origin)
    assert isinstance(config, TrainConfig)
    sizes = config.model.vocab_size, config.model.max_seq_len
    with parallel.main_process_first():
        corpus = load_corpus(config.data, *sizes, origin.encoding)
    split = batch_function(config.data.pack_documents, origin.encoding.eos_id)
    return TextSource(config, corpus, origin.encoding, split)
