"""Continuing several prompts at once: padding, the cache, and rows that end when they like.

Prompts of unequal length are padded on the left. The padding has no part in the answer: a
row's positions count its own tokens, and its mask hides every column before them.
Axes: B row, T query position, S key position (column), V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import InputError
from ..model.kv_cache import StaticCache
from ..model.llama import Llama, causal_mask
from .config import PREFILL_CHUNK, Decoding, SamplingConfig, check_chunk
from .cuda_graph import GraphStep, give_back, graph_step
from .decoding import choose as choose_way
from .numpy_step import NumpyStep
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
    finished and runs the model on the rest. ``decoding`` is how it runs, see decoding.py, and
    ``n_tokens`` how many tokens a captured step has (one, but for Speculative).
    Raises InputError for an empty prompt, one that fills the context, and ids outside the
    vocabulary.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
        decoding: Decoding = "auto",
        n_tokens: int = 1,
    ) -> None:
        check_chunk(prefill_chunk)
        for prompt in prompts:
            require_fitting(model, prompt)
        weight = model.model.embed_tokens.weight
        self.model, self.device = model, weight.device
        # What follows has an entry for every row computed: all that are not finished, and in a
        # graph, whose shapes are fixed, the finished ones too.
        self.prompts = list(range(len(prompts)))  # the prompt's index
        self.settings = list(settings)
        self.tensors = Settings.of(settings, self.device)
        self.draws = [torch.Generator().manual_seed(s.seed) for s in settings]
        self.left = [
            min(s.max_new_tokens, model.config.max_seq_len - len(prompt))
            for s, prompt in zip(settings, prompts, strict=True)
        ]  # tokens still to write
        longest = max(map(len, prompts))
        self.pads = [longest - len(prompt) for prompt in prompts]
        self.finished: set[int] = set()
        self.is_ahead = False  # whether the model has run on the tokens chosen last
        self.seen = self._seen(prompts)
        columns = longest + max(self.left)
        way = choose_way(decoding, model, len(prompts), max(self.left))
        self.graph: GraphStep | None = None
        if way in ("graph", "compiled", "kernels"):
            # The last token written is not run on; only a step of several goes past it.
            room = columns + n_tokens - 1
            self.graph = graph_step(model, len(prompts), room, way, n_tokens)
            self.cache = self.graph.cache
        else:
            rows = len(prompts)
            self.cache = StaticCache(model.config, rows, columns, weight.dtype, self.device)
        tokens = [[0] * pad + list(p) for pad, p in zip(self.pads, prompts, strict=True)]
        for part in torch.tensor(tokens, device=self.device).split(prefill_chunk, dim=1):
            self._run_eager(part)
        self.numpy = NumpyStep(model, self.cache) if way == "numpy" else None
        if self.graph:
            self.graph.begin(self.pads)

    @property
    def rows(self) -> list[int]:
        """The prompts, by index, that are not finished."""
        return [prompt for prompt in self.prompts if prompt not in self.finished]

    @property
    def length(self) -> int:
        """Columns that the cache holds."""
        return self.cache.length

    @torch.inference_mode()
    def choose(self) -> list[Token]:
        """Choose the next token of every row that is not finished."""
        logits = self.logits_BV
        is_finite = logits.isfinite().all()
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.tensors.repetition_penalty)
        if all(settings.temperature == 0 for settings in self.settings):
            ids = logits.argmax(-1)
        else:
            # Drawn on the CPU, so that they do not depend on the device.
            uniform = [torch.rand((), dtype=torch.float64, generator=g) for g in self.draws]
            probs = token_probabilities(logits, self.tensors)
            ids = draw(probs, torch.stack(uniform).to(self.device))
        # A draw from NaN lies outside the vocabulary, and is refused only further down.
        self.ids = ids = ids.clamp(max=logits.shape[-1] - 1)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        self.left = [left - 1 for left in self.left]
        results = torch.cat([ids, is_finite[None]])
        if self.graph is None or max(s.logprobs for s in self.settings) >= 0:
            read = results.tolist()
        else:
            read = self._read_ahead(results)
        if not read.pop():
            raise InputError("the model's logits are not finite; check its weights with compare.py")
        return self._described(read)

    @torch.inference_mode()
    def advance(self, finished: Collection[int] = ()) -> None:
        """Leave finished rows out, and run the model on the tokens chosen for the others."""
        self.finished.update(finished)
        if not self.rows:
            return
        if finished and self.graph is None:
            self._keep([i for i, row in enumerate(self.prompts) if row not in finished])
        if not self.is_ahead:
            self._run(self.ids)
        self.is_ahead = False

    def close(self) -> None:
        """Keep what was captured for the next request. Nothing can be chosen after that."""
        if self.graph:
            give_back(self.graph)
            self.graph = None

    def _read_ahead(self, results: Tensor) -> list[int]:
        """Read what was chosen while the GPU is already at the next step."""
        host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
        host.copy_(results, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if max(self.left) > 0:
            self._run(self.ids)
            self.is_ahead = True
        copied.synchronize()
        return host.tolist()

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Mark the prompts' tokens [B, V]; None where no row asks for a penalty."""
        if all(settings.repetition_penalty == 1 for settings in self.settings):
            return None
        shape = len(prompts), self.model.config.vocab_size
        seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for i, prompt in enumerate(prompts):
            seen[i, list(prompt)] = True
        return seen

    def _run(self, ids_B: Tensor) -> None:
        if self.graph:
            self.logits_BV = self.graph(ids_B[:, None])[:, -1]
        elif self.numpy:
            self.logits_BV = self.numpy(int(ids_B))
        else:
            self._run_eager(ids_B[:, None])

    def _run_eager(self, tokens_BT: Tensor) -> None:
        positions, mask = self._placed(tokens_BT.shape[1])
        hidden, _ = self.model.model(tokens_BT, positions=positions, mask=mask, cache=self.cache)
        # Only the last position is needed, and with padding on the left it is the last column.
        self.logits_BV = self.model.head(hidden[:, -1])

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
        self.prompts = [self.prompts[i] for i in keep]
        self.settings = [self.settings[i] for i in keep]
        self.draws = [self.draws[i] for i in keep]
        self.pads = [self.pads[i] for i in keep]
        self.left = [self.left[i] for i in keep]
        index = torch.tensor(keep, device=self.device)
        self.tensors, self.ids = self.tensors.rows(index), self.ids[index]
        self.seen = None if self.seen is None else self.seen[index]
        spare = min(self.pads)  # columns that are padding in every row left
        self.pads = [pad - spare for pad in self.pads]
        self.cache.keep(index, spare)

    def _described(self, ids: list[int]) -> list[Token]:
        """Return the tokens of the rows that are not finished, with what they ask for."""
        tokens = []
        logprobs = self._logprobs()
        columns = zip(self.prompts, ids, self.left, self.settings, strict=True)
        for i, (prompt, id_, left, settings) in enumerate(columns):
            if prompt in self.finished:
                continue
            token = Token(prompt, id_, left == 0, None, ())
            if settings.logprobs >= 0:
                values, likeliest = logprobs[i].topk(min(settings.logprobs, logprobs.shape[1]))
                pairs = tuple(zip(likeliest.tolist(), values.tolist(), strict=True))
                token = token._replace(logprob=logprobs[i, id_].item(), likeliest=pairs)
            tokens.append(token)
        return tokens

    def _logprobs(self) -> Tensor:
        """Return the model's log-probabilities [B, V]; nothing where no row asks for them."""
        if max(settings.logprobs for settings in self.settings) < 0:
            return torch.empty(0)
        return self.logits_BV.double().log_softmax(-1)


def run(batch: Batch, ended: Callable[[Token], bool]) -> Iterator[Token]:
    """Yield every row's tokens, rows mixed, until all have ended: as ``ended`` says, or full."""
    try:
        while batch.rows:
            finished = set()
            for token in batch.choose():
                if ended(token) or token.last:
                    finished.add(token.row)
                yield token
            batch.advance(finished)
    finally:
        batch.close()


def generate(
    model: Llama,
    prompt: Sequence[int],
    settings: SamplingConfig,
    stop: Collection[int] = (),
    decoding: Decoding = "auto",
) -> Iterator[int]:
    """Yield the token ids after one prompt until a token of ``stop`` (not yielded) or a limit.

    The limits are ``max_new_tokens`` and the model's context. Raises InputError as Batch does.
    """
    batch = Batch(model, [prompt], [settings], decoding=decoding)
    for token in run(batch, lambda token: token.id in stop):
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
