"""Generation: prefill the prompts, then sample a token of each row and decode it, in turn.

Prompts of unequal length are continued together, padded on the left, which does not change the
result: a row's positions count its own tokens, and its mask hides the padding (model/masks.py).
decoding.py chooses how a token is decoded; ``finish_reason`` decides when a row ends.
Suffixes: B row, T position, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..model.llama import Llama
from .config import PREFILL_CHUNK, Decoding, SamplingConfig, check_chunk
from .cpu_choice import prompt_products
from .cuda_graph import GraphStore
from .decoding import DecodeStep, make_step
from .eager_step import EagerStep
from .sampling import SamplingTensors, draw, penalize, token_probabilities

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One token sampled for one row."""

    prompt: int  # its index in the batch
    id: int
    reached_length_limit: bool  # whether the row has max_new_tokens tokens or fills the context
    logprob: float | None  # before repetition penalty, temperature, top-k, top-p and min-p
    top_logprobs: tuple[tuple[int, float], ...]  # (id, log-probability), most probable first

    @property
    def likeliest(self) -> tuple[tuple[int, float], ...]:
        """The former name of ``top_logprobs``."""
        return self.top_logprobs


def finish_reason(
    token: Token, stop_ids: Collection[int] = (), has_stop_text: bool = False
) -> FinishReason | None:
    """Return the reason why a row ends with a token, or None if it continues.

    "stop": the token is one of ``stop_ids``, or completes a stop text (``has_stop_text``).
    "length": the row has ``max_new_tokens`` tokens, or fills the context. Where both hold, "stop".
    """
    if token.id in stop_ids or has_stop_text:
        return "stop"
    return "length" if token.reached_length_limit else None


@dataclass
class Row:
    """State of one sequence in a batch."""

    prompt: int  # the prompt's index
    settings: SamplingConfig
    generator: torch.Generator
    remaining: int  # tokens still to sample
    padding: int  # padding columns before the first token
    is_finished: bool = False


class DecodeBatch:
    """Sequences decoded together; each gets the tokens that it gets alone.

    Call ``prefill`` once; then ``sample`` (a token of each unfinished row) and
    ``decode_one_token`` (of the rows that have not ended), in turn; ``close`` at the end.

    ``settings`` has an entry for each of the ``prompts``, which are token ids. ``prefill_chunk``
    is the number of prompt columns in one forward pass, ``decoding`` the mode (see decoding.py),
    ``graphs`` the store of captured steps (None: they are not kept), ``step`` a decoding step in
    place of the mode's. Raises InputError for an empty prompt, one that fills the context, ids
    outside the vocabulary, and a mode that cannot run.
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
    ) -> None:
        check_chunk(prefill_chunk)
        for prompt in prompts:
            require_fitting(model, prompt)
        self.model, self.prompts, self.prefill_chunk = model, prompts, prefill_chunk
        self.device = model.model.embed_tokens.weight.device
        longest = max(map(len, prompts))
        # All rows that are computed: a captured step, whose shapes are fixed, keeps finished ones.
        self.rows = [
            Row(
                prompt=i,
                settings=each,
                generator=torch.Generator().manual_seed(each.seed),
                remaining=new_token_limit(model, prompt, each),
                padding=longest - len(prompt),
            )
            for i, (prompt, each) in enumerate(zip(prompts, settings, strict=True))
        ]
        self.sampling = SamplingTensors.from_configs(settings, self.device)
        self.seen_BV = self._seen_tokens()
        self.logits_are_ready = False  # whether the model has run on the tokens sampled last
        n_tokens = max(row.remaining for row in self.rows)
        self.step = step or make_step(
            model, len(prompts), longest + n_tokens, n_tokens, decoding, graphs
        )
        self.products = prompt_products(model, decoding)

    @property
    def unfinished(self) -> list[int]:
        """Indices of the prompts whose rows are not finished."""
        return [row.prompt for row in self.rows if not row.is_finished]

    @torch.inference_mode()
    def prefill(self) -> None:
        """Run the model on the prompts, ``prefill_chunk`` columns at a time, and fill the cache."""
        padding = [row.padding for row in self.rows]
        rows = zip(padding, self.prompts, strict=True)
        tokens_BT = torch.tensor([[0] * n + list(p) for n, p in rows], device=self.device)
        eager = EagerStep(self.model, self.step.cache, self.products)  # in every mode; see there
        eager.begin(padding)
        # Padding is on the left: the last column is the last token of every row.
        self.logits_BV = eager.prefill(tokens_BT, self.prefill_chunk)
        self.step.begin(padding)

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
        if all(row.settings.temperature == 0 for row in self.rows):
            ids_B = logits_BV.argmax(-1)
        else:
            # The CPU's generator, so that samples do not depend on the device.
            uniform = [
                torch.rand((), dtype=torch.float64, generator=row.generator) for row in self.rows
            ]
            probs_BV = token_probabilities(logits_BV, self.sampling)
            ids_B = draw(probs_BV, torch.stack(uniform).to(self.device))
        # A draw from NaN lies outside the vocabulary; the logits' check comes further down.
        self.ids_B = ids_B = ids_B.clamp(max=logits_BV.shape[-1] - 1)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, ids_B[:, None], True)
        for row in self.rows:
            row.remaining -= 1
        results = torch.cat([ids_B, is_finite[None]])
        reads_ahead = self.step.is_captured and not self._wants_logprobs()
        ids = self._read_ahead(results) if reads_ahead else results.tolist()
        if not ids.pop():
            half = "float16 overflows from 65,504 on: try another --dtype, or "
            advice = half if self.logits_BV.dtype == torch.float16 else ""
            raise InputError(
                f"the model's logits are not finite; {advice}check its weights with compare.py"
            )
        return self._to_tokens(ids)

    @torch.inference_mode()
    def decode_one_token(self, finished: Collection[int] = ()) -> None:
        """Mark rows as finished (by their prompts' indices); decode the other rows' tokens.

        A captured step computes the finished rows too; ``sample`` leaves them out. Where
        ``sample`` launched the step, nothing is left to decode.
        """
        for row in self.rows:
            row.is_finished |= row.prompt in finished
        if not self.unfinished:
            return
        if finished and not self.step.is_captured:
            self._select_rows([i for i, row in enumerate(self.rows) if not row.is_finished])
        if not self.logits_are_ready:
            self.logits_BV = self.step.decode(self.ids_B)
        self.logits_are_ready = False

    def close(self) -> None:
        """Release the decoding step; the batch must not be used afterwards."""
        self.step.close()

    def _read_ahead(self, results: Tensor) -> list[int]:
        """Return the results, int64 [B + 1], read while the GPU runs the next decoding step."""
        host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
        host.copy_(results, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if max(row.remaining for row in self.rows) > 0:
            self.logits_BV = self.step.decode(self.ids_B)
            self.logits_are_ready = True
        copied.synchronize()
        return host.tolist()

    def _seen_tokens(self) -> Tensor | None:
        """Return a mask [B, V] of each prompt's tokens; None where no row has a penalty."""
        if all(row.settings.repetition_penalty == 1 for row in self.rows):
            return None
        shape = len(self.prompts), self.model.config.vocab_size
        seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for i, prompt in enumerate(self.prompts):
            seen_BV[i, list(prompt)] = True
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

    def _to_tokens(self, ids: list[int]) -> list[Token]:
        """Return the unfinished rows' tokens, with log-probabilities where requested."""
        tokens = []
        logprobs_BV = self.logits_BV.double().log_softmax(-1) if self._wants_logprobs() else None
        for i, (row, id_) in enumerate(zip(self.rows, ids, strict=True)):
            if row.is_finished:
                continue
            token = Token(row.prompt, id_, row.remaining == 0, None, ())
            if logprobs_BV is not None and row.settings.logprobs >= 0:
                logprobs_V = logprobs_BV[i]
                values, top = logprobs_V.topk(min(row.settings.logprobs, len(logprobs_V)))
                pairs = tuple(zip(top.tolist(), values.tolist(), strict=True))
                token = token._replace(logprob=logprobs_V[id_].item(), top_logprobs=pairs)
            tokens.append(token)
        return tokens

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


def new_token_limit(model: Llama, prompt: Sequence[int], settings: SamplingConfig) -> int:
    """Return the number of new tokens: ``max_new_tokens``, or as many as the context holds."""
    return min(settings.max_new_tokens, model.config.max_seq_len - len(prompt))


def require_fitting(model: Llama, prompt: Sequence[int]) -> None:
    """Raise InputError for an empty prompt, one that fills the context, or an unknown token id."""
    config = model.config
    if not 0 < len(prompt) < config.max_seq_len:
        raise InputError(
            f"the prompt is {len(prompt)} tokens long and the context holds {config.max_seq_len}; "
            "give between 1 and one fewer than that"
        )
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise InputError(f"token id {token} is outside the vocabulary of {config.vocab_size}")
