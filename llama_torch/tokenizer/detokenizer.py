"""Incremental detokenizer: text in whole characters, without its stop texts."""

from collections.abc import Sequence

from .tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # how decoders show the bytes of a character that is not complete


class Detokenizer:
    """The text of tokens as it becomes complete, one token at a time.

    A character is never split between two pieces, and neither is a stop text: text that may become
    one is held back. The text ends with the first character that completes a stop text, whatever
    tokens divide it, and is cut where that begins: of "b" and "abc" it is "b" that ends "abcd",
    since to wait for the longer could mean to write on after the shorter. Of two that one
    character completes the longer is cut. ``before`` are the ids that the text continues.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.decode = tokenizer, tokenizer.decode
        self.stop = stop
        # Decoders treat a beginning differently (Llama 2's drops a space), so each piece is
        # decoded after the one before it.
        self.window = self._tail(list(before))
        self.fresh = len(self.window)  # where the newest piece begins
        self.shown = len(self.decode(self.window))  # characters of the window already given out
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that no later token can change or stop."""
        if not self.tokenizer.is_text(token):
            return ""
        self.window.append(token)
        return self._release(self._grown())

    def finish(self) -> str:
        """Return the text held back, with the bytes of an unfinished character marked."""
        text, self.held = self.held + self.decode(self.window)[self.shown :], ""
        cut = self._cut(text)
        self.stopped |= cut is not None
        return text[:cut]

    def _tail(self, ids: list[int]) -> list[int]:
        """Return the last few ids, more where these begin inside a character."""
        ids = ids[-16:]  # enough for any character
        starts = range(max(len(ids) - 4, 0), 0, -1)
        whole = (n for n in starts if not self.decode(ids[n:]).startswith(UNFINISHED))
        return ids[next(whole, 0) :]

    def _grown(self) -> str:
        text = self.decode(self.window)
        pending = len(self.window) - self.fresh
        # A character has four bytes at most: what is longer will never be one.
        ready = text if pending > 8 else text.rstrip(UNFINISHED)
        piece = ready[self.shown :]
        self.shown = max(self.shown, len(ready))
        if ready == text:
            self.window, self.fresh = self.window[self.fresh :], len(self.window) - self.fresh
            self.shown = len(self.decode(self.window))
        return piece

    def _release(self, piece: str) -> str:
        text, self.held = self.held + piece, ""
        cut = self._cut(text)
        if cut is not None:
            self.stopped = True
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _cut(self, text: str) -> int | None:
        """Return where the stop text that is complete first begins, however tokens divide it."""
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stop if stop in text]
        return sum(min(ends)) if ends else None


def _overlap(text: str, stop: str) -> int:
    """Return how many of the text's last characters may be the beginning of a stop text."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)
