"""Speculative decoding: a draft model proposes tokens, the target model verifies several at once.

Verifying costs about as much as decoding one token, since the weights are read once (Leviathan et
al. 2022). A draft token is accepted if it is the token that the target model samples, so the text
is the same with and without a draft, as a sample is a function of the seed. (Up to rounding:
products of several rows round differently from those of one, which in float32 seldom changes a
sampled token, and in half precision sometimes does.)
Suffixes: B row, T position, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import InputError
from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from .config import PREFILL_CHUNK, Decoding, SamplingConfig
from .cuda_graph import GraphStep, GraphStore
from .decoding import choose_mode, make_step
from .eager_step import EagerStep
from .engine import DecodeBatch, most_new_tokens, require_fitting
from .numpy_step import NumpyStep


@torch.inference_mode()
def speculative_batch(
    model: Llama,
    draft: Llama,
    prompt: Sequence[int],
    settings: SamplingConfig,
    prefill_chunk: int = PREFILL_CHUNK,
    decoding: Decoding = "auto",
    n_guesses: int = 4,
    graphs: GraphStore | None = None,
) -> DecodeBatch:
    """Return a batch of one sequence, decoded with ``n_guesses`` draft tokens at a time.

    Raises InputError for a draft of another vocabulary, and a mode that cannot verify draft tokens.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the draft's vocabulary has {draft.config.vocab_size} tokens and the model's "
            f"{model.config.vocab_size}; give a draft with the model's tokenizer"
        )
    require_fitting(model, prompt)
    n_tokens = most_new_tokens(model, prompt, settings)
    # Kernels and NumPy decode one token at a time, and so cannot verify several.
    if decoding in ("kernels", "numpy"):
        raise InputError(f"--decoding {decoding} checks no guesses; leave it or --draft out")
    if decoding == "auto":
        mode = choose_mode("auto", model, 1, settings.max_new_tokens)
        decoding = "graph" if mode in ("kernels", "graph") else "eager"
    columns = len(prompt) + n_tokens
    checker = make_step(model, 1, columns, n_tokens, decoding, graphs, n_guesses + 1)
    assert isinstance(checker, EagerStep | GraphStep)
    guesser = Draft(draft, checker.cache.size, prefill_chunk)
    step = SpeculativeStep(checker, guesser, prompt, n_tokens, n_guesses)
    return DecodeBatch(model, [prompt], [settings], prefill_chunk, step=step)


class SpeculativeStep:
    """A DecodeStep of one sequence that verifies draft tokens; see decoding.py."""

    is_captured = False  # the next tokens to run depend on the one sampled

    def __init__(
        self,
        checker: EagerStep | GraphStep,
        draft: "Draft",
        prompt: Sequence[int],
        n_tokens: int,
        n_guesses: int,
    ) -> None:
        self.checker, self.draft, self.n_guesses = checker, draft, n_guesses
        self.text = list(prompt)  # token ids of the prompt and those sampled after it
        self.longest = len(prompt) + n_tokens
        self.guesses: list[int] = []  # draft tokens verified but not yet sampled
        self.checked_TV = torch.empty(0)  # logits after the last token and each draft token

    @property
    def cache(self) -> StaticCache:
        """The model's cache."""
        return self.checker.cache

    def begin(self, padding: Sequence[int]) -> None:
        """Continue from the cache's length; one sequence has no padding."""
        self.checker.begin(padding)

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [1, V] after one token; no forward pass for a draft token."""
        token = int(tokens_B)
        self.text.append(token)
        if self.guesses and self.guesses[0] == token:
            del self.guesses[0]
            self.checked_TV = self.checked_TV[1:]
        else:
            self.cache.length = len(self.text) - 1  # drops rejected draft tokens
            remaining = self.longest - len(self.text)
            self.guesses = self.draft.guess(self.text, min(self.n_guesses, remaining - 1))
            self.checked_TV = self.checker.decode_row([token, *self.guesses])
        return self.checked_TV[:1]

    def close(self) -> None:
        """Release the target model's step."""
        self.checker.close()


class Draft:
    """A draft model that continues token ids greedily, with its own cache."""

    def __init__(self, model: Llama, size: int, prefill_chunk: int) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.prefill_chunk = model, prefill_chunk
        self.cache = StaticCache(model.config, 1, size, weight.dtype, weight.device)
        self.eager = EagerStep(model, self.cache)
        is_quick = choose_mode("auto", model, 1, 1) == "numpy"
        self.quick = NumpyStep(model, self.cache) if is_quick else None

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """Return ``count`` token ids after ``text``, or as many as the draft's context holds.

        ``text`` is the last call's token ids, possibly shortened, followed by new ones.
        """
        fitting = self.model.config.max_seq_len - len(text)
        guesses: list[int] = []
        # The cache holds at most all token ids but the newest.
        self.cache.length = min(self.cache.length, len(text) - 1)
        tokens = text[self.cache.length :]
        while len(guesses) < min(count, fitting):
            guesses.append(int(self._logits(tokens).argmax()))
            tokens = guesses[-1:]
        return guesses

    def _logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [V] after ``tokens``, which follow those in the cache."""
        row_BT = torch.tensor([tokens], device=self.cache.keys.device)
        if self.quick and len(tokens) == 1:
            return self.quick.decode(row_BT[0])[0]
        return self.eager.prefill(row_BT, self.prefill_chunk)[0]
