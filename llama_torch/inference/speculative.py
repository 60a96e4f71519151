"""Speculative decoding: a draft model proposes tokens, the target model verifies several at once.

Verifying several tokens takes about as long as decoding one, since the weights are read once
(Leviathan et al. 2022). A draft token is accepted if it is the token that is sampled from the
target model's logits. A sample is a function of logits and seed, so the tokens are those without
a draft model, up to rounding: products of several rows round differently from those of one, which
in float32 seldom changes a sampled token, and in half precision sometimes does.
Suffixes: B row, T position, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_common.errors import InputError

from ..model.kv_cache import StaticCache
from ..model.llama import Llama
from .config import PREFILL_CHUNK, Decoding, SamplingConfig
from .cpu_choice import prompt_products
from .cuda_graph import GraphStep, GraphStore
from .decoding import choose_mode, make_step
from .eager_step import EagerStep
from .engine import DecodeBatch
from .native_step import NativeStep
from .numpy_step import NumpyStep
from .rows import new_token_limit, require_fitting


@torch.inference_mode()
def speculative_batch(
    model: Llama,
    draft: Llama,
    prompt: Sequence[int],
    settings: SamplingConfig,
    prefill_chunk: int = PREFILL_CHUNK,
    decoding: Decoding = "auto",
    n_draft_tokens: int = 4,
    graphs: GraphStore | None = None,
) -> DecodeBatch:
    """Return a DecodeBatch of one prompt that verifies ``n_draft_tokens`` draft tokens at a time.

    Raises InputError for a draft model of another vocabulary, a mode that cannot verify draft
    tokens, and the prompts that DecodeBatch refuses.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the draft's vocabulary has {draft.config.vocab_size} tokens and the model's "
            f"{model.config.vocab_size}; give a draft with the model's tokenizer"
        )
    require_fitting(model, prompt)
    n_tokens = new_token_limit(model, prompt, settings)
    # Kernels, C and NumPy decode one token at a time, and so cannot verify several.
    if decoding in ("kernels", "native", "numpy"):
        raise InputError(
            f"--decoding {decoding} cannot verify draft tokens; leave it or --draft out"
        )
    products = prompt_products(model, decoding)
    if decoding == "auto":
        mode = choose_mode("auto", model, rows=1, n_tokens=n_tokens)
        decoding = "graph" if mode in ("kernels", "graph") else "eager"
    cache_size = len(prompt) + n_tokens
    target = make_step(model, 1, cache_size, n_tokens, decoding, graphs, n_draft_tokens + 1)
    assert isinstance(target, EagerStep | GraphStep)
    if isinstance(target, EagerStep):
        target.products = products
    draft_model = DraftModel(draft, target.cache.size, prefill_chunk)
    step = SpeculativeStep(target, draft_model, prompt, n_tokens, n_draft_tokens)
    return DecodeBatch(model, [prompt], [settings], prefill_chunk, step=step)


class SpeculativeStep:
    """DecodeStep of one sequence that verifies draft tokens; see decoding.py.

    ``target`` is the target model's step; ``n_tokens`` the number of new tokens.
    """

    is_captured = False  # the tokens of the next forward pass depend on the one sampled

    def __init__(
        self,
        target: EagerStep | GraphStep,
        draft: "DraftModel",
        prompt: Sequence[int],
        n_tokens: int,
        n_draft_tokens: int,
    ) -> None:
        self.target, self.draft, self.n_draft_tokens = target, draft, n_draft_tokens
        self.token_ids = list(prompt)  # the prompt and the tokens sampled after it
        self.max_length = len(prompt) + n_tokens
        self.draft_tokens: list[int] = []  # draft tokens verified but not yet sampled
        self.logits_TV = torch.empty(0)  # logits after the last token and each draft token

    @property
    def cache(self) -> StaticCache:
        """The target model's cache."""
        return self.target.cache

    def begin(self, padding: Sequence[int]) -> None:
        """Continue after the cache's last column; one sequence has no padding."""
        self.target.begin(padding)

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [1, V] after one token, int64 [1].

        An accepted draft token's logits are known already. For any other token the draft model
        proposes the next ones, and the target model runs on all of them.
        """
        token = int(tokens_B)
        self.token_ids.append(token)
        if self.draft_tokens and self.draft_tokens[0] == token:
            del self.draft_tokens[0]
            self.logits_TV = self.logits_TV[1:]
        else:
            self.cache.length = len(self.token_ids) - 1  # drops rejected draft tokens
            remaining = self.max_length - len(self.token_ids)
            self.draft_tokens = self.draft.propose(
                self.token_ids, min(self.n_draft_tokens, remaining - 1)
            )
            self.logits_TV = self.target.decode_row([token, *self.draft_tokens])
        return self.logits_TV[:1]

    def close(self) -> None:
        """Release the target model's step."""
        self.target.close()


class DraftModel:
    """Draft model, which continues token ids greedily, with a cache of ``size`` columns."""

    def __init__(self, model: Llama, size: int, prefill_chunk: int) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.prefill_chunk = model, prefill_chunk
        self.cache = StaticCache(model.config, 1, size, weight.dtype, weight.device)
        self.eager = EagerStep(model, self.cache, prompt_products(model))
        mode = choose_mode("auto", model, rows=1, n_tokens=2)  # of the steps after the first
        self.step: NativeStep | NumpyStep | None = None
        if mode in ("native", "numpy"):
            self.step = (NativeStep if mode == "native" else NumpyStep)(model, self.cache)

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return ``count`` token ids after ``token_ids``, or as many as the draft's context holds.

        All of them but the last must be those of the last call, followed by tokens it returned.
        """
        n_fitting = self.model.config.max_seq_len - len(token_ids)
        draft_tokens: list[int] = []
        # Drop the columns of rejected draft tokens; the newest token is not in the cache yet.
        self.cache.length = min(self.cache.length, len(token_ids) - 1)
        tokens = token_ids[self.cache.length :]
        while len(draft_tokens) < min(count, n_fitting):
            draft_tokens.append(int(self._logits(tokens).argmax()))
            tokens = draft_tokens[-1:]
        return draft_tokens

    def _logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [V] after ``tokens``, which follow the tokens in the cache."""
        row_BT = torch.tensor([tokens], device=self.cache.keys.device)
        if self.step and len(tokens) == 1:
            return self.step.decode(row_BT[0])[0]
        return self.eager.prefill(row_BT, self.prefill_chunk)[0]
