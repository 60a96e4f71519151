"""Score answers by a reward model, or by two that are joined as the paper's R_c (section 3.2.3).

Suffixes: B answer, T position.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..checkpoint.hf import load_reward_model, require_finite
from ..model.pair_loss import scores_at
from ..model.reward import RewardModel
from ..tokenizer.chat_template import ChatTemplate, Message, own_jinja
from ..tokenizer.loading import load_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from ..training.conversation_loading import DAY
from .answers import Answer
from .prompts import TokenisedPrompt

UNSAFE_BELOW = 0.15  # of the safety score after sigmoid
BATCH_TOKENS = 16384  # of a forward pass, padding included


class Scores(NamedTuple):
    """What the reward models say of B answers, each float64 [B] on the CPU; linear, not sigmoid."""

    rewards: Tensor  # the helpfulness model's, or with a safety model logit(R_c)
    helpful: Tensor
    safe: Tensor | None  # None without a safety model


class Scorer:
    """A reward model with its tokenizer and template, beside those that answers are drawn with.

    Where both are the same, it reads the tokens as they were drawn. Otherwise it reads the
    conversation as its own template writes it.
    """

    def __init__(
        self, model: RewardModel, template: ChatTemplate, drawn_by: ChatTemplate, name: str
    ) -> None:
        self.model, self.name, self.template, self.drawn_by = model, name, template, drawn_by
        self.reads_drawn_ids = template.source == drawn_by.source and are_equal(
            template.tokenizer, drawn_by.tokenizer
        )
        self.written_answer = self._written_answer()

    def encode(self, prompt: TokenisedPrompt, answer: Answer) -> list[int]:
        """Return the ids of a prompt with its answer, whose last token has the score.

        What the template writes behind an answer's end token follows it, as the reward model has
        learnt; an answer that was cut ends with the last token drawn. Raises InputError for a
        conversation longer than the context, and where the template fails.
        """
        vocabulary = self.model.config.vocab_size
        if self.reads_drawn_ids and max(answer.ids, default=0) < vocabulary:
            ids = [*prompt.ids, *answer.ids]
            ids += self._tail(ids[-1]) if answer.is_ended else []
        else:
            text = self.drawn_by.tokenizer.decode(answer.ids)
            ids = self._rendered([*prompt.prompt.messages, assistant(text)], prompt.prompt.place)
        self._require_room(len(ids), prompt.prompt.place)
        return ids

    def require_room(self, prompts: Sequence[TokenisedPrompt], max_new_tokens: int) -> None:
        """Raise InputError where a prompt with an answer may be longer than the context.

        To be told before answers are drawn. Of a conversation that is written anew this does not
        know the length, but that of the longest prompt with an answer of one letter; ``encode``
        does.
        """
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        messages, place = longest.prompt.messages, longest.prompt.place
        if self.reads_drawn_ids:
            n_tail = max(map(len, map(self._tail, self.template.tokenizer.special.values())))
            n_tokens = len(longest.ids) + max_new_tokens + n_tail
        else:
            n_tokens = len(self._rendered([*messages, assistant("2")], place))
        self._require_room(n_tokens, place)

    def _require_room(self, n_tokens: int, place: str) -> None:
        context = self.model.config.max_seq_len
        if n_tokens > context:
            raise InputError(
                f"{self.name}: {place} with its answer takes {n_tokens:,} tokens and its context "
                f"holds {context:,}; ask for fewer --max-new-tokens, or leave the prompt out"
            )

    def score(self, rows: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> Tensor:
        """Return the scores of conversations, float64 [B] on the CPU.

        Forward passes take conversations of like lengths, padded on the right, where causal
        attention keeps them from being seen; ``batch_tokens`` of them, or one conversation.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores_B = torch.zeros(len(rows), dtype=torch.float64)
        while order:
            n_rows = max(1, batch_tokens // len(rows[order[0]]))
            batch, order = order[:n_rows], order[n_rows:]
            scores_B[batch] = self._batch_scores([rows[i] for i in batch])
        return scores_B

    @torch.inference_mode()
    def _batch_scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        head, longest = self.model.head_weight, max(map(len, rows))
        padded = [[*row, *[0] * (longest - len(row))] for row in rows]
        hidden_BTD, _ = self.model(torch.tensor(padded, device=head.device), project=False)
        last_B = torch.tensor([len(row) - 1 for row in rows], device=head.device)
        scores_B = scores_at(hidden_BTD, head, last_B).double().cpu()
        if not scores_B.isfinite().all():
            raise InputError(f"{self.name}: its scores are not finite; try another --dtype")
        return scores_B

    def _written_answer(self) -> list[int]:
        """Return what the template writes for a last answer of one word, and behind it."""
        asked: list[Message] = [{"role": "user", "content": "1"}]
        whole = self._rendered([*asked, assistant("2")], "a conversation")
        return whole[len(self.template.encode(asked)) :]

    def _tail(self, end: int) -> list[int]:
        """Return what the template writes behind the end token of a conversation's last answer."""
        written = self.written_answer
        return written[written.index(end) + 1 :] if end in written else []

    def _rendered(self, messages: Sequence[Message], place: str) -> list[int]:
        try:
            return self.template.encode(messages, prompts=False)
        except InputError as error:
            raise InputError(f"{self.name}: {place}: {error}") from None


def assistant(text: str) -> Message:
    """Return the assistant's message of a text."""
    return {"role": "assistant", "content": text}


def load_scorer(
    directory: str,
    drawn_by: ChatTemplate,
    flag: str = "--reward",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Scorer:
    """Load a reward model's directory, which ``flag`` names.

    ``drawn_by`` is the template, with its tokenizer, of the model that answers. Raises InputError
    for a directory that is no reward model's, or that cannot read the conversations.
    """
    path = Path(directory)
    model = load_reward_model(path, dtype=dtype, device=device)
    require_finite(model, f"{flag} {directory}")
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    template = own_jinja(path, tokenizer, DAY)
    if template is None:
        if not are_equal(tokenizer, drawn_by.tokenizer):
            raise InputError(
                f"{flag} {directory}: has another tokenizer than the model that answers, and no "
                "chat template to write the conversation by; put its chat_template.jinja there"
            )
        template = drawn_by
    return Scorer(model, template, drawn_by, f"{flag} {directory}")


def are_equal(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers have the same tokens under the same ids."""
    return (
        one.n_ids == other.n_ids
        and one.special == other.special
        and one.hidden == other.hidden
        and all(one.decode([i]) == other.decode([i]) for i in range(one.n_ids))
    )


def score_answers(
    prompts: Sequence[TokenisedPrompt],
    answers: Sequence[Answer],
    helpful: Scorer,
    safe: Scorer | None = None,
) -> Scores:
    """Return the scores of B answers, each to the prompt at its place in ``prompts``.

    With a safety model the reward is logit(R_c): the safety score where the prompt is tagged or
    that score's sigmoid is below 0.15, else the helpfulness model's. It is not whitened.
    """
    pairs = list(zip(prompts, answers, strict=True))
    helpful_B = helpful.score([helpful.encode(*pair) for pair in pairs])
    if safe is None:
        return Scores(helpful_B, helpful_B, None)
    safe_B = safe.score([safe.encode(*pair) for pair in pairs])
    tagged_B = torch.tensor([prompt.prompt.is_tagged for prompt in prompts], dtype=torch.bool)
    return Scores(combined_scores(helpful_B, safe_B, tagged_B), helpful_B, safe_B)


def combined_scores(helpful_B: Tensor, safe_B: Tensor, tagged_B: Tensor) -> Tensor:
    """Return logit(R_c) [B] of linear scores and the prompts' tags, bool [B] (section 3.2.3)."""
    return torch.where(tagged_B | (safe_B.sigmoid() < UNSAFE_BELOW), safe_B, helpful_B)
