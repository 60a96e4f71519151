"""The text of one prompt's continuation, assembled token by token."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..tokenizer.detokenizer import Detokenizer
from ..tokenizer.tokenizer import Tokenizer
from .config import SamplingConfig
from .engine import FinishReason, Token, finish_reason


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt."""

    text: str  # without the prompt, end tokens and stop texts
    tokens: tuple[Token, ...]  # all drawn, with their log-probabilities where asked for
    finish_reason: FinishReason


class CompletionBuilder:
    """One row's tokens and text so far, and why it stopped."""

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
        """Add a token and its text; return the reason if it is the row's last."""
        self.tokens.append(token)
        piece = "" if token.id in self.stop_ids else self.detokenizer.push(token.id)
        if self._finish_reason(token):
            piece += "" if self.detokenizer.stopped else self.detokenizer.finish()
            # The text that finish() released may hold a stop text: asked again.
            self.finish_reason = self._finish_reason(token)
        self.pieces.append(piece)
        return self.finish_reason

    def build(self) -> Completion:
        """Return the text and tokens of a row that has stopped."""
        assert self.finish_reason is not None
        return Completion("".join(self.pieces), tuple(self.tokens), self.finish_reason)

    def _finish_reason(self, token: Token) -> FinishReason | None:
        return finish_reason(token, self.stop_ids, self.detokenizer.stopped)
