"""Generation: prefill the prompts, then sample a token of each row and decode it, in turn.

Prompts of unequal length are continued together, padded on the left, which does not change the
result: a row's positions count its own tokens, and its mask hides the padding (model/masks.py).
So a prompt can take the row of one that has ended, amid the others: its columns end where theirs
do. decoding.py chooses how a token is decoded; ``finish_reason`` decides when a row ends.
Suffixes: B row, T position, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..model.llama import Llama
from .config import PREFILL_CHUNK, Decoding, SamplingConfig, check_chunk, check_rows
from .cpu_choice import prompt_products
from .cuda_graph import GraphStore
from .decoding import DecodeStep, make_step
from .eager_step import EagerStep, left_padded, prefill_distinct
from .rows import (
    FinishReason,
    Row,
    Token,
    draw_tokens,
    finish_reason,
    new_token_limit,
    require_fitting,
    to_tokens,
)
from .sampling import SamplingTensors, log_probability, penalize

# Waiting prompts are run when one row in so many is free: each time the others' decoding waits.
REFILL_SHARE = 8


class DecodeBatch:
    """Sequences decoded together; each gets the tokens that it gets alone.

    Call ``prefill`` once; then ``sample`` (a token of each unfinished row) and
    ``decode_one_token`` (of the rows that have not ended), in turn; ``close`` at the end.

    ``settings`` has an entry for each of the ``prompts``, which are token ids. ``prefill_chunk``
    is the number of prompt columns in one forward pass, ``decoding`` the mode (see decoding.py),
    ``graphs`` the store of captured steps (None: they are not kept), ``step`` a decoding step in
    place of the mode's. At most ``max_rows`` prompts (0: all) are decoded at a time, and the others
    wait for their rows. ``drawn_logprobs`` gives each token its ``drawn_logprob``. Raises
    InputError for an empty prompt, one that fills the context, ids outside the vocabulary, and a
    mode that cannot run.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
        decoding: Decoding = "auto",
        graphs: GraphStore | None = None,
        step: DecodeStep | None = None,
        max_rows: int = 0,
        drawn_logprobs: bool = False,
    ) -> None:
        check_chunk(prefill_chunk)
        check_rows(max_rows)
        for prompt in prompts:
            require_fitting(model, prompt)
        self.model, self.prompts, self.prefill_chunk = model, prompts, prefill_chunk
        self.settings, self.drawn_logprobs = settings, drawn_logprobs
        self.device = model.model.embed_tokens.weight.device
        n_rows = min(max_rows or len(prompts), len(prompts))
        # All rows that are computed: a captured step, whose shapes are fixed, keeps finished ones.
        self.rows = [self._new_row(i) for i in range(n_rows)]
        self.waiting = deque(range(n_rows, len(prompts)))
        self.refill_at = max(1, n_rows // REFILL_SHARE)
        self._set_sampling()
        # Where no row has a penalty, None.
        has_penalty = any(each.repetition_penalty != 1 for each in settings)
        self.seen_BV = self._seen_tokens(range(n_rows)) if has_penalty else None
        self.logits_are_ready = False  # whether the model has run on the tokens sampled last
        limits = [new_token_limit(model, *pair) for pair in zip(prompts, settings, strict=True)]
        longest, n_tokens = max(map(len, prompts)), max(limits)
        size, n_steps = longest + n_tokens, n_tokens
        if self.waiting:
            # Of the columns that a row needs, the rows that go on have used some when it begins.
            size = min(size, model.config.max_seq_len) + n_tokens
            n_steps *= -(-len(prompts) // n_rows)
        self.step = step or make_step(model, n_rows, size, n_steps, decoding, graphs)
        self.products = prompt_products(model, decoding)

    @property
    def unfinished(self) -> list[int]:
        """Indices of the prompts that are not finished."""
        return [*(row.prompt for row in self.rows if not row.is_finished), *self.waiting]

    @torch.inference_mode()
    def prefill(self) -> None:
        """Run the model on the prompts, ``prefill_chunk`` columns at a time, and fill the cache."""
        prompts = [self.prompts[row.prompt] for row in self.rows]
        longest = max(map(len, prompts))
        if len(set(map(tuple, prompts))) < len(prompts):
            self.step.cache.shift(longest)
            self._fill(range(len(prompts)))
        else:
            for row, prompt in zip(self.rows, prompts, strict=True):
                row.padding = longest - len(prompt)
            eager = EagerStep(
                self.model, self.step.cache, self.products
            )  # in every mode; see there
            eager.begin([row.padding for row in self.rows])
            # Padding is on the left: the last column is the last token of every row.
            self.logits_BV = eager.prefill(left_padded(prompts, self.device), self.prefill_chunk)
        self.step.begin([row.padding for row in self.rows])

    @torch.inference_mode()
    def sample(self) -> list[Token]:
        """Draw the next token of every row, and return those of the unfinished rows.

        Each row has one token fewer to sample, and its token counts as seen by the repetition
        penalty. A captured step runs on the tokens already, while they are read
        (``decode_one_token`` then finds its logits ready). Raises InputError where a logit is not
        finite.
        """
        logits_BV = self.logits_BV
        is_finite = logits_BV.isfinite().all()
        if self.seen_BV is not None:
            logits_BV = penalize(logits_BV, self.seen_BV, self.sampling.repetition_penalty)
        ids_B, probs_BV = draw_tokens(logits_BV, self.rows, self.sampling)
        # A draw from NaN lies outside the vocabulary; the logits' check comes further down.
        self.ids_B = ids_B = ids_B.clamp(max=logits_BV.shape[-1] - 1)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, ids_B[:, None], True)
        for row in self.rows:
            row.remaining -= 1
        drawn = [log_probability(probs_BV, ids_B)] if self.drawn_logprobs else []
        results = torch.cat([ids_B, is_finite[None], *(x.view(torch.int64) for x in drawn)])
        reads_ahead = self.step.is_captured and not self._wants_logprobs()
        results = self._read_ahead(results) if reads_ahead else results.cpu()
        ids_B, is_finite, drawn_B = results.tensor_split([len(self.rows), len(self.rows) + 1])
        if not is_finite:
            half = "float16 overflows from 65,504 on: try another --dtype, or "
            advice = half if self.logits_BV.dtype == torch.float16 else ""
            raise InputError(
                f"the model's logits are not finite; {advice}check its weights with compare.py"
            )
        wanted = self.logits_BV if self._wants_logprobs() else None
        return to_tokens(self.rows, ids_B.tolist(), drawn_B.view(torch.float64).tolist(), wanted)

    @torch.inference_mode()
    def decode_one_token(self, finished: Collection[int] = ()) -> None:
        """Mark rows as finished (by their prompts' indices); decode the other rows' tokens.

        A captured step computes the finished rows too; ``sample`` leaves them out. Where
        ``sample`` launched the step, nothing is left to decode.
        """
        for row in self.rows:
            row.is_finished |= row.prompt in finished
        going_on = [i for i, row in enumerate(self.rows) if not row.is_finished]
        if not (going_on or self.waiting):
            return
        if len(going_on) < len(self.rows) and not (self.waiting or self.step.is_captured):
            self._select_rows(going_on)
        if going_on and not self.logits_are_ready:
            self.logits_BV = self.step.decode(self.ids_B)
        self.logits_are_ready = False
        if self.waiting:
            self._refill(len(self.rows) - len(going_on))

    def close(self) -> None:
        """Release the decoding step; the batch must not be used afterwards."""
        self.step.close()

    def _read_ahead(self, results: Tensor) -> Tensor:
        """Return the results, int64, read while the GPU runs the next decoding step."""
        host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
        host.copy_(results, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._launch_next()
        copied.synchronize()
        return host

    def _launch_next(self) -> None:
        """Run the step on the tokens sampled last, unless no row that goes on has more to sample.

        Columns are kept for the rows that go on; the others', which they may not need, are not.
        """
        if any(row.remaining > 0 for row in self.rows if not row.is_finished):
            self.logits_BV = self.step.decode(self.ids_B)
            self.logits_are_ready = True

    def _new_row(self, prompt: int) -> Row:
        settings = self.settings[prompt]
        generator = torch.Generator().manual_seed(settings.seed)
        limit = new_token_limit(self.model, self.prompts[prompt], settings)
        return Row(prompt, settings, generator, limit)

    def _refill(self, n_free: int) -> None:
        """Give rows that are free to waiting prompts, if they are enough of them, and run these."""
        if n_free < min(self.refill_at, len(self.waiting)):
            return
        cache = self.step.cache
        used = [cache.length - row.padding for row in self.rows if not row.is_finished]
        places = [i for i, row in enumerate(self.rows) if row.is_finished][: len(self.waiting)]
        for i in places:
            self.rows[i] = self._new_row(self.waiting.popleft())
        longest = max(len(self.prompts[self.rows[i].prompt]) for i in places)
        n_tokens = max(row.remaining for row in self.rows if not row.is_finished)
        # A step for one row knows no padding.
        if longest > cache.length or cache.length + n_tokens > cache.size or len(self.rows) == 1:
            columns = max([longest, *used]) - cache.length
            cache.shift(columns)
            for row in self.rows:
                row.padding = max(0, row.padding + columns)
        self._set_sampling()
        if self.seen_BV is not None:
            self.seen_BV[places] = self._seen_tokens(places)
        self._fill(places)
        self.step.begin([row.padding for row in self.rows])

    def _fill(self, places: Sequence[int]) -> None:
        """Run the prompts of the rows ``places``, and write them before the cache's next column."""
        prompts = [self.prompts[self.rows[i].prompt] for i in places]
        chunk, cache = self.prefill_chunk, self.step.cache
        filled, logits_BV, index = prefill_distinct(self.model, prompts, chunk, self.products)
        rows = torch.tensor(places, device=self.device)
        cache.put_rows(rows, filled, index)
        for i, prompt in zip(places, prompts, strict=True):
            self.rows[i].padding = cache.length - len(prompt)
        if len(places) == len(self.rows):
            self.logits_BV = logits_BV[index]
        else:
            self.logits_BV[rows] = logits_BV[index].to(self.logits_BV.dtype)

    def _set_sampling(self) -> None:
        settings = [row.settings for row in self.rows]
        self.sampling = SamplingTensors.from_configs(settings, self.device)

    def _seen_tokens(self, places: Sequence[int]) -> Tensor:
        """Return a mask [n, V] of the tokens of the prompts of the rows ``places``."""
        shape = len(places), self.model.config.vocab_size
        seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for seen_V, i in zip(seen_BV, places, strict=True):
            seen_V[list(self.prompts[self.rows[i].prompt])] = True
        return seen_BV

    def _select_rows(self, indices: list[int]) -> None:
        """Keep the rows ``indices``; drop the columns that are padding in all of them."""
        self.rows = [self.rows[i] for i in indices]
        index = torch.tensor(indices, device=self.device)
        self.sampling, self.ids_B = self.sampling.select_rows(index), self.ids_B[index]
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]
        n_dropped = min(row.padding for row in self.rows)
        for row in self.rows:
            row.padding -= n_dropped
        self.step.cache.select_rows(index, n_dropped)
        self.step.begin([row.padding for row in self.rows])

    def _wants_logprobs(self) -> bool:
        return any(row.settings.logprobs >= 0 for row in self.rows)


def generate_tokens(
    batch: DecodeBatch, finish: Callable[[Token], FinishReason | None] = finish_reason
) -> Iterator[Token]:
    """Yield the tokens of all rows, interleaved, until ``finish`` has given each row a reason."""
    try:
        batch.prefill()
        while batch.unfinished:
            finished = set()
            for token in batch.sample():
                if finish(token):
                    finished.add(token.prompt)
                yield token
            batch.decode_one_token(finished)
    finally:
        batch.close()


def generate(
    model: Llama,
    prompt: Sequence[int],
    settings: SamplingConfig,
    stop: Collection[int] = (),
    decoding: Decoding = "auto",
    graphs: GraphStore | None = None,
) -> Iterator[int]:
    """Yield the token ids after one prompt, until a token of ``stop`` (not yielded) or a limit.

    The limits are ``max_new_tokens`` and the context. Raises InputError as DecodeBatch does.
    """
    batch = DecodeBatch(model, [prompt], [settings], decoding=decoding, graphs=graphs)
    for token in generate_tokens(batch, lambda token: finish_reason(token, stop)):
        if token.id not in stop:
            yield token.id
