"""Decode tokens to text incrementally, in whole characters and without stop texts."""

from collections.abc import Sequence

from .tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # decoders return it for the bytes of an incomplete character


class Detokenizer:
    """Decodes one token at a time, and returns the text that is complete.

    A character is never split between two pieces. Text that may become a stop text is held back.
    The text ends at the first character that completes a stop text, whatever its token boundaries,
    and is cut where that stop text begins: with the stop texts "b" and "abc", "abcd" is cut
    before "b". Of two stop texts that end at the same character the longer is cut. ``before``
    are the ids that precede the text, ``stop`` the stop texts.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.decode = tokenizer, tokenizer.decode
        self.stop = stop
        # Decoders treat the first token differently (Llama 2's drops a space), so each piece is
        # decoded after the previous one.
        self.window = self._tail(list(before))
        self.newest = len(self.window)  # the index in the window of the newest piece
        self.n_emitted = len(self.decode(self.window))  # characters of the window already returned
        self.pending_text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token id; return the text that no later token can change or cut."""
        if not self.tokenizer.is_text(token):
            return ""
        self.window.append(token)
        return self._release(self._grown())

    def finish(self) -> str:
        """Return the text held back; an incomplete character is U+FFFD."""
        text, self.pending_text = self.pending_text + self.decode(self.window)[self.n_emitted :], ""
        cut = self._cut(text)
        self.stopped |= cut is not None
        return text[:cut]

    def _tail(self, ids: list[int]) -> list[int]:
        """Return the last ids that decode from a character boundary on."""
        ids = ids[-16:]  # enough for any character
        starts = range(max(len(ids) - 4, 0), 0, -1)
        whole = (n for n in starts if not self.decode(ids[n:]).startswith(UNFINISHED))
        return ids[next(whole, 0) :]

    def _grown(self) -> str:
        text = self.decode(self.window)
        n_pending = len(self.window) - self.newest
        # A character has at most four bytes: more pending tokens are no character.
        ready = text if n_pending > 8 else text.rstrip(UNFINISHED)
        piece = ready[self.n_emitted :]
        self.n_emitted = max(self.n_emitted, len(ready))
        if ready == text:
            self.window, self.newest = self.window[self.newest :], len(self.window) - self.newest
            self.n_emitted = len(self.decode(self.window))
        return piece

    def _release(self, piece: str) -> str:
        text, self.pending_text = self.pending_text + piece, ""
        cut = self._cut(text)
        if cut is not None:
            self.stopped = True
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.pending_text = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _cut(self, text: str) -> int | None:
        """Return the start of the first complete stop text, or None."""
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stop if stop in text]
        return sum(min(ends)) if ends else None


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
