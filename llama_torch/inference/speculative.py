"""Speculative decoding: a smaller model guesses, the model checks several guesses at a time.

Checking costs about what one token does, since the weights are read once (Leviathan et al. 2022).
Here a guess is right if it is the very token that the model itself chooses: what is written is
what it would be without guesses, greedy or drawn, since a draw is a function of the seed. (Up to
rounding: products of several rows round unlike those of one. In float32 that is hardly ever seen;
in half precision a draw may well fall otherwise, as often as between any two programs.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import InputError
from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from .config import PREFILL_CHUNK, Decoding, SamplingConfig
from .decoding import choose as choose_way
from .engine import Batch
from .numpy_step import NumpyStep


class Speculative(Batch):
    """One sequence continued with guesses; see Batch. Guesses are the draft's likeliest tokens."""

    def __init__(
        self,
        model: Llama,
        draft: Llama,
        prompt: Sequence[int],
        settings: SamplingConfig,
        prefill_chunk: int = PREFILL_CHUNK,
        decoding: Decoding = "auto",
        n_guesses: int = 4,
    ) -> None:
        if draft.config.vocab_size != model.config.vocab_size:
            raise InputError(
                f"the draft's vocabulary has {draft.config.vocab_size} tokens and the model's "
                f"{model.config.vocab_size}; give a draft with the model's tokenizer"
            )
        # What checks several tokens at once is the model itself; kernels and NumPy have one.
        if decoding in ("kernels", "numpy"):
            raise InputError(f"--decoding {decoding} checks no guesses; leave it or --draft out")
        if decoding == "auto":
            way = choose_way("auto", model, 1, settings.max_new_tokens)
            decoding = "graph" if way in ("kernels", "graph") else "eager"
        self.draft, self.n_guesses, self.text = draft, n_guesses, list(prompt)
        self.chunk = prefill_chunk
        self.guesses: list[int] = []
        self.checked = torch.empty(0)  # logits after the last token and after each guess left
        super().__init__(model, [prompt], [settings], prefill_chunk, decoding, n_guesses + 1)
        weight, size = draft.model.embed_tokens.weight, self.cache.size
        self.draft_cache = StaticCache(draft.config, 1, size, weight.dtype, weight.device)
        is_quick = choose_way("auto", draft, 1, 1) == "numpy"
        self.quick = NumpyStep(draft, self.draft_cache) if is_quick else None

    def _read_ahead(self, results: Tensor) -> list[int]:
        read: list[int] = results.tolist()  # what is run next depends on it
        return read

    def _run(self, ids_B: Tensor) -> None:
        token = int(ids_B)
        self.text.append(token)
        if self.guesses and self.guesses[0] == token:
            del self.guesses[0]
            self.checked = self.checked[1:]
        else:
            self.cache.length = len(self.text) - 1  # forgets what was guessed wrong
            self.guesses = self._guess(min(self.n_guesses, self.left[0] - 1))
            self.checked = self._check([token, *self.guesses])
        self.logits_BV = self.checked[:1]

    def _check(self, tokens: list[int]) -> Tensor:
        """Return the logits [T, V] after each token."""
        if self.graph:
            spare = self.n_guesses + 1 - len(tokens)
            self.graph.begin(self.pads)
            row = torch.tensor([tokens + [0] * spare], device=self.device)
            return self.graph(row)[0, : len(tokens)].clone()
        row = torch.tensor([tokens], device=self.device)
        hidden, _ = self.model.model(row, cache=self.cache)
        return self.model.head(hidden[0])

    def _guess(self, count: int) -> list[int]:
        """Continue the text by the draft's likeliest tokens, as far as its context goes."""
        room = self.draft.config.max_seq_len - len(self.text)
        guesses: list[int] = []
        # All of the text but its newest token is known to be what the draft has read, if as long.
        self.draft_cache.length = min(self.draft_cache.length, len(self.text) - 1)
        tokens = self.text[self.draft_cache.length :]
        while len(guesses) < min(count, room):
            guesses.append(int(self._draft_logits(tokens).argmax()))
            tokens = guesses[-1:]
        return guesses

    def _draft_logits(self, tokens: list[int]) -> Tensor:
        """Return the draft's logits [V] after these tokens, the next of its cache."""
        if self.quick and len(tokens) == 1:
            return self.quick(tokens[0])[0]
        row = torch.tensor([tokens], device=self.draft_cache.keys.device)
        for part in row.split(self.chunk, dim=1):
            hidden, _ = self.draft.model(part, cache=self.draft_cache)
        return self.draft.head(hidden[0, -1])
