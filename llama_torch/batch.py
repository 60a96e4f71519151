"""Continuing several prompts at once: padding, the cache, and rows that end when they like.

Prompts of unequal length are padded on the left. The padding has no part in the answer: a
row's positions count its own tokens, and its mask hides every column before them.
Axes: B row, T query position, S key position (column), V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .config import InputError
from .generation_config import PREFILL_CHUNK, SamplingConfig, check_chunk
from .model import Llama, causal_mask
from .sampling import Settings, draw, penalize, token_probabilities


class Token(NamedTuple):
    """One token chosen for one row."""

    row: int  # the prompt's index in the batch
    id: int
    last: bool  # by the row's max_new_tokens, or because the context is full
    logprob: float | None  # under the model itself: before penalty, temperature and cuts
    likeliest: tuple[tuple[int, float], ...]  # the model's first choices and theirs


class Batch:
    """Rows that are continued together; each as if it were alone.

    ``choose`` returns one token a row that is not finished; ``advance`` says which rows are
    finished and runs the model on the rest. Raises InputError for an empty prompt, one that
    fills the context, and ids outside the vocabulary.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        check_chunk(prefill_chunk)
        for prompt in prompts:
            require_fitting(model, prompt)
        self.model, self.device = model, model.head_weight.device
        self.rows = list(range(len(prompts)))  # those not finished, by the prompt's index
        self.settings = list(settings)
        self.tensors = Settings.of(settings, self.device)
        self.draws = [torch.Generator().manual_seed(s.seed) for s in settings]
        longest = max(map(len, prompts))
        self.left = [
            min(s.max_new_tokens, model.config.max_seq_len - len(prompt))
            for s, prompt in zip(settings, prompts, strict=True)
        ]  # tokens still to write
        self.pads = [longest - len(prompt) for prompt in prompts]
        tokens = [[0] * pad + list(p) for pad, p in zip(self.pads, prompts, strict=True)]
        self.seen = self._seen(prompts)
        self._prefill(torch.tensor(tokens, device=self.device), prefill_chunk)

    @property
    def length(self) -> int:
        """Columns that the cache holds."""
        return 0 if self.cache is None else self.cache.length

    @torch.inference_mode()
    def choose(self) -> list[Token]:
        """Choose the next token of every row that is not finished."""
        if not self.logits_BV.isfinite().all():
            raise InputError("the model's logits are not finite; check its weights with compare.py")
        logits = self.logits_BV
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.tensors.repetition_penalty)
        if all(settings.temperature == 0 for settings in self.settings):
            ids = logits.argmax(-1)
        else:
            # On the CPU, so that the draw itself does not depend on the device.
            uniform = [torch.rand((), dtype=torch.float64, generator=g) for g in self.draws]
            probs = token_probabilities(logits, self.tensors)
            ids = draw(probs.cpu(), torch.stack(uniform)).to(self.device)
        self.ids = ids
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        self.left = [left - 1 for left in self.left]
        return self._described(ids.tolist())

    @torch.inference_mode()
    def advance(self, finished: Collection[int] = ()) -> None:
        """Leave finished rows out, and run the model on the tokens chosen for the others."""
        if finished:
            self._keep([i for i, row in enumerate(self.rows) if row not in finished])
        if self.rows:
            self._run(self.ids[:, None])

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Mark the prompts' tokens [B, V]; None where no row asks for a penalty."""
        if all(settings.repetition_penalty == 1 for settings in self.settings):
            return None
        shape = len(prompts), self.model.config.vocab_size
        seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for i, prompt in enumerate(prompts):
            seen[i, list(prompt)] = True
        return seen

    def _prefill(self, tokens_BT: Tensor, chunk: int) -> None:
        self.cache: Cache | None = None
        for part in tokens_BT.split(chunk, dim=1):
            self._run(part)

    def _run(self, tokens_BT: Tensor) -> None:
        positions, mask = self._placed(tokens_BT.shape[1])
        hidden, self.cache = self.model.model(
            tokens_BT, positions=positions, mask=mask, cache=self.cache
        )
        # Only the last position is needed, and with padding on the left it is the last column.
        self.logits_BV = F.linear(hidden[:, -1], self.model.head_weight)

    def _placed(self, length: int) -> tuple[Tensor | None, Tensor | None]:
        """Return positions [B, T] and mask [B, T, S] of the next columns; None: the defaults."""
        if not any(self.pads):
            return None, None
        start = self.length
        pads = torch.tensor(self.pads, device=self.device)[:, None]
        columns = torch.arange(start + length, device=self.device)
        positions = (columns[start:] - pads).clamp(min=0)
        mask = causal_mask(length, start + length, self.device) & (columns >= pads)[:, None]
        # Padding sees itself: attention over nothing has no value.
        return positions, mask | (columns == columns[start:, None])

    def _keep(self, keep: list[int]) -> None:
        self.rows = [self.rows[i] for i in keep]
        self.settings = [self.settings[i] for i in keep]
        self.draws = [self.draws[i] for i in keep]
        self.pads = [self.pads[i] for i in keep]
        self.left = [self.left[i] for i in keep]
        if not keep:
            return
        index = torch.tensor(keep, device=self.device)
        self.tensors, self.ids = self.tensors.rows(index), self.ids[index]
        self.seen = None if self.seen is None else self.seen[index]
        spare = min(self.pads)  # columns that are padding in every row left
        self.pads = [pad - spare for pad in self.pads]
        assert self.cache is not None
        self.cache = Cache(
            *(tuple(part[index, :, spare:] for part in parts) for parts in self.cache)
        )

    def _described(self, ids: list[int]) -> list[Token]:
        wanted = [settings.logprobs for settings in self.settings]
        described = [
            Token(row, id_, left == 0, None, ())
            for row, id_, left in zip(self.rows, ids, self.left, strict=True)
        ]
        if max(wanted) < 0:
            return described
        logprobs = self.logits_BV.double().log_softmax(-1)
        values, tokens = logprobs.topk(min(max(wanted), logprobs.shape[-1]))
        for i, (token, most) in enumerate(zip(described, wanted, strict=True)):
            if most >= 0:
                pairs = zip(tokens[i, :most].tolist(), values[i, :most].tolist(), strict=True)
                own = logprobs[i, token.id].item()
                described[i] = token._replace(logprob=own, likeliest=tuple(pairs))
        return described


def run(batch: Batch, ended: Callable[[Token], bool]) -> Iterator[Token]:
    """Yield every row's tokens, rows mixed, until all have ended: as ``ended`` says, or full."""
    while batch.rows:
        finished = set()
        for token in batch.choose():
            if ended(token) or token.last:
                finished.add(token.row)
            yield token
        batch.advance(finished)


def generate(
    model: Llama, prompt: Sequence[int], settings: SamplingConfig, stop: Collection[int] = ()
) -> Iterator[int]:
    """Yield the token ids after one prompt until a token of ``stop`` (not yielded) or a limit.

    The limits are ``max_new_tokens`` and the model's context. Raises InputError as Batch does.
    """
    for token in run(Batch(model, [prompt], [settings]), lambda token: token.id in stop):
        if token.id not in stop:
            yield token.id


def require_fitting(model: Llama, prompt: Sequence[int]) -> None:
    """Raise InputError for a prompt that this model cannot continue by a single token."""
    config = model.config
    if not 0 < len(prompt) < config.max_seq_len:
        raise InputError(
            f"the prompt is {len(prompt)} tokens long and the context holds {config.max_seq_len}; "
            "give between 1 and one fewer than that"
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise InputError(f"token id {token} is outside the vocabulary of {config.vocab_size}")
