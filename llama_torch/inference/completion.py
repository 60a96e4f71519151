"""Completions: the text and tokens that follow one prompt, assembled token by token."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..tokenizer.detokenizer import Detokenizer
from ..tokenizer.tokenizer import Tokenizer
from .config import SamplingConfig
from .rows import FinishReason, Token, finish_reason


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt."""

    text: str  # without the prompt, end tokens and stop texts
    tokens: tuple[Token, ...]  # all sampled tokens; log-probabilities where requested
    finish_reason: FinishReason


class CompletionBuilder:
    """Collects one row's tokens and text, and the reason why it ends.

    ``ids`` are the prompt's token ids; ``end_ids`` the checkpoint's end tokens. Raises InputError
    for a stop token of ``settings`` that is not one token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        ids: Sequence[int],
        settings: SamplingConfig,
    ) -> None:
        self.settings = settings
        self.detokenizer = Detokenizer(tokenizer, ids, settings.stop)
        self.stop_ids = set() if settings.ignore_eos else set(end_ids)
        self.stop_ids |= {tokenizer.token_id(t, "--stop-tokens") for t in settings.stop_tokens}
        self.pieces: list[str] = []
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None

    def add(self, token: Token) -> FinishReason | None:
        """Add a token and its text; return the finish reason, None if the row continues."""
        self.tokens.append(token)
        piece = "" if token.id in self.stop_ids else self.detokenizer.push(token.id)
        if self._finish_reason(token):
            piece += "" if self.detokenizer.stopped else self.detokenizer.finish()
            # The text that finish() releases may complete a stop text.
            self.finish_reason = self._finish_reason(token)
        self.pieces.append(piece)
        return self.finish_reason

    def build(self) -> Completion:
        """Return the Completion of a row that has ended."""
        assert self.finish_reason is not None
        return Completion("".join(self.pieces), tuple(self.tokens), self.finish_reason)

    def _finish_reason(self, token: Token) -> FinishReason | None:
        return finish_reason(token, self.stop_ids, self.detokenizer.stopped)
