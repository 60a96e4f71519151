"""Draw answers to prompts, with the log-probability of every token that is drawn."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from llama_common.errors import InputError

from ..inference.config import PREFILL_CHUNK, Decoding, SamplingConfig
from ..inference.cuda_graph import GraphStore
from ..inference.engine import DecodeBatch, generate_tokens
from ..inference.rows import Token, finish_reason
from ..model.llama import Llama


class Answer(NamedTuple):
    """What a model answered to one prompt."""

    prompt: int  # the prompt's index among those given
    ids: list[int]  # the tokens drawn, the end token included
    log_probs: list[float]  # of each, under the distribution that it was drawn from
    is_ended: bool  # by an end token, and not by the limit of new tokens


def draw_answers(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingConfig],
    end_ids: Collection[int],
    rows: int = 0,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    decoding: Decoding = "auto",
    graphs: GraphStore | None = None,
) -> Iterator[Answer]:
    """Yield the answers to the prompts, token ids, each as soon as it has ended.

    model     may be in training: its weights are read where they are, and not copied.
    settings  of each prompt. An answer is a function of the prompt, its settings and their seed,
              up to rounding: not of the other prompts, the number of rows, nor the order.
    rows      number of answers drawn at once (0: all). The row of one that has ended is given to
              the next prompt, so that all are kept busy.

    A prompt of which several answers are wanted is given several times, with other seeds; those
    that begin together are run through the model once. Raises InputError as DecodeBatch does.
    """
    if not prompts:
        return
    batch = DecodeBatch(
        *(model, prompts, settings, prefill_chunk, decoding, graphs),
        max_rows=rows,
        drawn_logprobs=True,
    )
    drawn: list[list[Token]] = [[] for _ in prompts]
    tokens = generate_tokens(batch, lambda token: finish_reason(token, end_ids))
    for token in tokens:
        own = drawn[token.prompt]
        own.append(token)
        if reason := finish_reason(token, end_ids):
            log_probs = [one.drawn_logprob for one in own if one.drawn_logprob is not None]
            yield Answer(token.prompt, [one.id for one in own], log_probs, reason == "stop")
            own.clear()


def require_ends(ends: Collection[int], name: str) -> None:
    """Raise InputError, whose first words are ``name``, where no token ends an answer."""
    if not ends:
        raise InputError(
            f"{name}: names no end token, so that no answer would end; give a model fine-tuned on "
            "conversations"
        )


def sample_seed(seed: int, *numbers: int) -> int:
    """Return a seed, below 2^63, of its own for each tuple of numbers: of a prompt and a sample.

    Two neighbouring ones have nothing in common, as those of ``seed + i`` have with another run's.
    """
    text = " ".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
