"""Answers to prompts as a run's data: drawn anew by the model in training. A BatchSource.

Suffixes: R answers, T position.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..checkpoint.weight_files import model_digest
from ..data.packing import PackedSampler
from ..distributed.job import broadcast_object
from ..distributed.parallel import Parallel
from ..inference.generation_file import end_ids
from ..model.loss import IGNORE_INDEX
from ..ppo_config import PpoConfig
from ..tokenizer.answers import spelled
from ..tokenizer.chat_template import ChatTemplate, load_jinja
from ..tokenizer.loading import load_tokenizer
from ..training.batch import Batch
from ..training.conversation_loading import DAY, TEMPLATE_FILE, held_apart
from ..training.origin import Origin
from ..training.prompt import Prompt
from .answers import require_ends, sample_seed
from .ppo_objective import Field
from .ppo_rollouts import Rollouts, advantages_of, largest_mismatch, to_windows
from .prompts import TokenisedPrompt, load_prompts, tokenise

SHAPES = 4  # widths of micro-batches, at most: torch.compile compiles a block for each
NAMED = 16  # prompts of a bad training step that its error names
HELD_OUT = 2**32  # in place of a training step's number, for the seeds of validation


@dataclass
class RolloutSource:
    """Windows of drawn answers, float64 [R, 10, T]; see Field."""

    config: PpoConfig
    train: list[TokenisedPrompt]
    val: list[TokenisedPrompt]
    n_long: int  # prompts that were left out
    template: ChatTemplate
    end_ids: frozenset[int]
    directory_files: Mapping[str, str]
    # What share of the positions is drawn is not known before: speeds are told as if the head,
    # which reads those alone, took no time.
    learnt_share: float = 0.0
    parallel: Parallel = field(default_factory=Parallel)
    rollouts: Rollouts | None = None  # once the model is built
    memory: str = ""

    @cached_property
    def key(self) -> str:
        """The hash of all prompts and of the frozen models."""
        digest = hashlib.sha256()
        for prompts in (self.train, self.val):
            for prompt in prompts:
                digest.update(f"{prompt.ids} {prompt.prompt.is_tagged} ".encode())
        for flag, folder in frozen_directories(self.config).items():
            digest.update(f"{flag} {model_digest(Path(folder))}".encode())
        return digest.hexdigest()[:32]

    @property
    def steps(self) -> int:
        """The run's length: --steps."""
        return self.config.steps

    def describe(self) -> Sequence[str]:
        """Return lines on prompts, answers, frozen models and their memory."""
        config, frozen = self.config, frozen_directories(self.config)
        lengths = [len(prompt.ids) for prompt in self.train]
        each = config.answers_per_prompt
        of_each = f"{each} answers to each of {config.rollout_batch // each:,} prompts"
        drawn = of_each if each > 1 else f"{config.rollout_batch:,} answers"
        left_out = f"; {self.n_long:,} longer ones left out" if self.n_long else ""
        lines = [
            f"{', '.join(config.data.data)}: {len(self.train):,} prompts of {min(lengths):,} to "
            f"{max(lengths):,} tokens, {len(self.val):,} held out{left_out}",
            f"{config.steps // config.steps_at_once:,} times {drawn} of at most "
            f"{config.max_new_tokens:,} tokens, and {config.steps_at_once:,} steps on them",
            f"frozen: {', '.join(f'{flag} {name}' for flag, name in frozen.items())}",
        ]
        dry = ["the time of steps is without that of drawing"] if config.dry_run else []
        return [*lines, self.memory, *dry]

    def sampler(self, first: int, last: int, rank: int = 0, world: int = 1) -> PackedSampler:
        """Return the sampler of one rank's prompts of training steps ``first`` to ``last`` - 1."""
        rows = self.config.windows_per_step // self.config.answers_per_prompt
        n_read = self.steps * rows
        given = len(self.train), n_read, self.config.seed, rows
        return PackedSampler(*given, first, last, rank, world)

    def train_windows(
        self, first: int, last: int, rank: int = 0, world: int = 1
    ) -> Generator[Tensor, None, None]:
        """Yield one rank's windows of each training step, the longest answers first.

        Before the first of the steps that go together their answers are drawn, by the model as it
        is then.
        """
        for start in range(first, last, self.config.steps_at_once):
            yield from self._draw(start, rank, world)

    def _draw(self, start: int, rank: int, world: int) -> Sequence[Tensor]:
        """Return one rank's windows of each of the steps from ``start`` that go together."""
        assert self.rollouts is not None
        config, count = self.config, self.config.steps_at_once
        assert start % count == 0
        sampler = self.sampler(start, start + count, rank, world)
        prompts, seeds = [], []
        for step in range(start, start + count):
            numbers = sampler.windows(step)
            for place, number in enumerate(numbers, rank * len(numbers)):
                for answer in range(config.answers_per_prompt):
                    prompts.append(self.train[number])
                    seeds.append(sample_seed(config.seed, step, place, answer))
        drawn = self.rollouts.draw(prompts, seeds)
        learnt = advantages_of(drawn, config, self.parallel)
        windows = to_windows(drawn, *learnt, largest_mismatch(drawn, self.parallel))
        return [longest_first(part) for part in windows.chunk(count)]

    def describe_step(self, step: int) -> str:
        """Return the places of a step's prompts."""
        numbers = self.sampler(step, step + 1).windows(step)
        places = [self.train[i].prompt.place for i in numbers]
        return ", ".join(places[:NAMED]) + (", ..." if len(places) > NAMED else "")

    def validation_windows(self) -> Sequence[Tensor]:
        """Return windows of answers to held-out prompts, drawn anew whenever they are read."""
        return HeldOutAnswers(self)

    def example_windows(self) -> Tensor:
        """Return windows of random ids, of the longest prompts and answers, of a whole step."""
        config = self.config
        shape = config.windows_per_step, len(Field), self.most
        windows = torch.zeros(shape, dtype=torch.float64)
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(config.model.vocab_size, windows[:, 0].shape, generator=generator)
        windows[:, Field.TOKEN] = ids
        windows[:, Field.TARGET] = ids.roll(-1, 1)
        windows[:, Field.TARGET, : -config.max_new_tokens] = IGNORE_INDEX
        return windows

    @cached_property
    def most(self) -> int:
        """The positions of the longest prompt of --data with the longest answer."""
        return max(len(prompt.ids) for prompt in self.train) + self.config.max_new_tokens - 1

    def to_batch(self, windows: Tensor) -> Batch:
        """Return windows [R, 10, T] as a micro-batch, of one of a few widths."""
        unit = 8 * -(-self.most // (8 * SHAPES))
        is_drawn_T = (windows[:, Field.TARGET] != IGNORE_INDEX).any(0)
        longest = int(is_drawn_T.nonzero()[-1]) + 1
        width = min(max(self.most, longest), -(-longest // unit) * unit)
        # Windows are as wide as the longest answer that was drawn with them, which may be less.
        padding = windows.new_zeros(*windows.shape[:2], max(0, width - windows.shape[2]))
        padding[:, Field.TARGET] = IGNORE_INDEX
        windows = torch.cat([windows, padding], 2)[:, :, :width]
        return Batch(windows[:, Field.TOKEN].long(), windows)

    def prompt(self) -> Prompt:
        """Return --sample-prompt as a user's message, or the first held-out prompt."""
        text, ids = self.config.sample_prompt, self.val[0].ids
        if text:
            ids = self.template.encode([{"role": "user", "content": text}])
        tokenizer = self.template.tokenizer
        return Prompt(spelled(tokenizer, ids), ids, tokenizer, self.end_ids)


class HeldOutAnswers(Sequence[Tensor]):
    """Windows of answers to held-out prompts, --batch-size each; the same seeds at every call.

    Reading the first ones draws, by the model as it is then, all that this process reads.
    """

    def __init__(self, source: RolloutSource) -> None:
        self.source, config = source, source.config
        size, n = config.batch_size, len(source.val)
        n = min(n, config.eval_batches * size) if config.eval_batches else n
        chosen = [source.val[i * len(source.val) // n] for i in range(n)]
        self.prompts = [chosen[i : i + size] for i in range(0, n, size)]
        self.drawn: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < self.source.parallel.data_size or index not in self.drawn:
            self._draw(index)
        return self.drawn[index]

    def _draw(self, first: int) -> None:
        """Draw the batches from ``first`` on that a process of so many reads."""
        source = self.source
        assert source.rollouts is not None
        numbers = range(first, len(self), source.parallel.data_size)
        prompts = [prompt for i in numbers for prompt in self.prompts[i]]
        seeds = [
            sample_seed(source.config.seed, HELD_OUT, i, j)
            for i in numbers
            for j in range(len(self.prompts[i]))
        ]
        drawn = source.rollouts.draw(prompts, seeds)
        nothing = torch.zeros_like(drawn.values)
        mismatch = (drawn.sampled - drawn.log_p).abs().max().item()
        sizes = [len(self.prompts[i]) for i in numbers]
        windows = to_windows(drawn, nothing, nothing, mismatch).split(sizes)
        self.drawn = dict(zip(numbers, windows, strict=True))


def longest_first(windows: Tensor) -> Tensor:
    """Return windows [R, 10, T] by the position of their last drawn token, the longest first."""
    is_drawn_RT = windows[:, Field.TARGET] != IGNORE_INDEX
    last_R = (is_drawn_RT * torch.arange(is_drawn_RT.shape[1])).amax(1)
    return windows[last_R.argsort(descending=True, stable=True)]


def frozen_directories(config: PpoConfig) -> dict[str, str]:
    """Return the directories of the reference and the reward models, by their flags."""
    given = {
        "--reference": config.data.reference or config.init_from,
        "--reward": config.data.reward,
        "--safety-reward": config.data.safety_reward,
    }
    return {flag: name for flag, name in given.items() if name}


def open_prompts(config: PpoConfig, origin: Origin, parallel: Parallel) -> RolloutSource:
    """Read and tokenise a run's prompts; the main process alone reads them.

    Raises InputError for prompts, a template or a tokenizer that cannot be learnt from.
    """
    for flag, frozen in frozen_directories(config).items():
        if not Path(frozen).is_dir():
            raise InputError(
                f"{flag} {frozen}: no such directory; a run reads it whenever it is started: name "
                "it, wherever it is now"
            )
    directory = origin.directory or Path(config.out)
    tokenizer = load_tokenizer(directory, config.model.vocab_size)
    name = config.data.template if origin.directory else ""
    template = load_jinja(directory, tokenizer, name, DAY)
    train, val, n_long = broadcast_object(lambda: _load(config, template))
    ends = frozenset(end_ids(directory, tokenizer, config.model.vocab_size))
    require_ends(ends, f"--init-from {directory}")
    files = {TEMPLATE_FILE: template.source} if name else {}
    return RolloutSource(config, train, val, n_long, template, ends, files, parallel=parallel)


def _load(
    config: PpoConfig, template: ChatTemplate
) -> tuple[list[TokenisedPrompt], list[TokenisedPrompt], int]:
    """Return prompts to learn from, held-out ones, and the number of those that are too long."""
    data, n_read = config.data, 0
    fitting: list[list[TokenisedPrompt] | None] = []
    for flag, names in (("--data", data.data), ("--val-data", data.val_data)):
        given = load_prompts(names, flag) if names else []
        n_read += len(given)
        limits = config.model.max_seq_len, config.max_new_tokens
        fitting.append(tokenise(given, template, *limits, flag) if given else None)
    # Held apart after those that are too long: the share is of the prompts that can be answered.
    train, val = held_apart(fitting[0] or [], fitting[1], data.val_fraction, "prompt")
    return train, val, n_read - len(train) - len(val)
