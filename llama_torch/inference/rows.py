"""The rows of a batch: each decodes one prompt at a time, draws its tokens, and knows its end.

Suffixes: B row, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..model.llama import Llama
from .config import SamplingConfig
from .sampling import (
    SamplingTensors,
    all_probabilities,
    draw,
    removes_tokens,
    token_probabilities,
)

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One token sampled for one row."""

    prompt: int  # its index in the batch
    id: int
    reached_length_limit: bool  # whether the row has max_new_tokens tokens or fills the context
    logprob: float | None  # before repetition penalty, temperature, top-k, top-p and min-p
    top_logprobs: tuple[tuple[int, float], ...]  # (id, log-probability), most probable first
    drawn_logprob: float | None = None  # after them all: of the distribution that it was drawn from

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
    padding: int = 0  # padding columns before the first token
    is_finished: bool = False


def draw_tokens(
    logits_BV: Tensor, rows: Sequence[Row], sampling: SamplingTensors
) -> tuple[Tensor, Tensor | None]:
    """Return the ids [B] drawn, and the probabilities [B, V]; None where every row is greedy."""
    if all(row.settings.temperature == 0 for row in rows):
        return logits_BV.argmax(-1), None
    # The CPU's generator, so that samples do not depend on the device.
    uniform = [torch.rand((), dtype=torch.float64, generator=row.generator) for row in rows]
    if any(removes_tokens(row.settings) for row in rows):
        probs_BV = token_probabilities(logits_BV, sampling)
    else:
        probs_BV = all_probabilities(logits_BV, sampling.temperature)
    return draw(probs_BV, torch.stack(uniform).to(logits_BV.device)), probs_BV


def to_tokens(
    rows: Sequence[Row], ids: Sequence[int], drawn: Sequence[float], logits_BV: Tensor | None
) -> list[Token]:
    """Return the tokens of the rows that are not finished.

    ``drawn`` are their ``drawn_logprob`` or empty; ``logits_BV`` is None where no row asks for
    other log-probabilities.
    """
    tokens = []
    logprobs_BV = None if logits_BV is None else logits_BV.double().log_softmax(-1)
    for i, (row, id_) in enumerate(zip(rows, ids, strict=True)):
        if row.is_finished:
            continue
        drawn_logprob = drawn[i] if drawn else None
        token = Token(row.prompt, id_, row.remaining == 0, None, (), drawn_logprob)
        if logprobs_BV is not None and row.settings.logprobs >= 0:
            logprobs_V = logprobs_BV[i]
            values, top = logprobs_V.topk(min(row.settings.logprobs, len(logprobs_V)))
            pairs = tuple(zip(top.tolist(), values.tolist(), strict=True))
            token = token._replace(logprob=logprobs_V[id_].item(), top_logprobs=pairs)
        tokens.append(token)
    return tokens


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
