"""The Python interface: a model with its tokenizer and its chat template.

::

    from llama_torch import load
    model = load("runs/1")
    print(model.generate("The", max_new_tokens=40).text)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from llama_common.errors import InputError, has_surrogates

from ..checkpoint.hf import load_model
from ..common.device import pick_device
from ..model.llama import Llama
from ..tokenizer.chat_template import ChatTemplate, Llama2Template, Message, load_chat_template
from ..tokenizer.gpt2 import located
from ..tokenizer.loading import load_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .completion import Completion, CompletionBuilder
from .config import (
    PREFILL_CHUNK,
    Decoding,
    DecodingConfig,
    Dtype,
    LoadConfig,
    Quantize,
    SamplingConfig,
)
from .cuda_graph import GraphStore
from .engine import DecodeBatch, generate_tokens
from .generation_file import end_ids
from .quantization import quantize as quantize_model
from .speculative import speculative_batch


class TextModel:
    """A language model with its tokenizer and chat template; returned by ``load``.

    The keyword arguments of ``generate``, ``stream``, ``chat`` and ``stream_chat`` are the fields
    of SamplingConfig, which documents them. All methods raise InputError for settings out of
    range, a prompt that is no text or does not fit the context, and logits that are not finite.
    """

    def __init__(
        self,
        ckpt: Path,
        model: Llama,
        tokenizer: Tokenizer,
        template: str = "",
        decoding: DecodingConfig | None = None,
        draft: Llama | None = None,
    ) -> None:
        self.ckpt, self.model, self.tokenizer, self._template = ckpt, model, tokenizer, template
        self.decoding, self.draft = decoding or DecodingConfig(), draft
        self.graphs = GraphStore(model)

    @cached_property
    def end_ids(self) -> set[int]:
        """The ids that end a text; InputError where generation_config.json cannot be followed."""
        return end_ids(self.ckpt, self.tokenizer, self.model.config.vocab_size)

    @cached_property
    def chat_template(self) -> ChatTemplate | Llama2Template:
        """The chat template, which encodes a conversation; InputError if there is none."""
        return load_chat_template(self.ckpt, self.tokenizer, self._template)

    def encode(self, prompt: str) -> list[int]:
        """Return a prompt's token ids, with a BOS first if the checkpoint was trained with one."""
        if has_surrogates(prompt):
            raise InputError("the prompt is not valid text; correct it")
        with located(f"--prompt {prompt[:20]!r}"):
            return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)]

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        stop_tokens: tuple[str, ...] = (),
        ignore_eos: bool = False,
        logprobs: int = -1,
    ) -> Completion:
        """Return the completion of one prompt."""
        settings = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop,
            stop_tokens, ignore_eos, logprobs,
        )  # fmt: skip
        return self._complete([self.encode(prompt)], [settings])[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        settings: SamplingConfig | Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
        max_rows: int = 0,
    ) -> list[Completion]:
        """Return the completions of prompts of any lengths, each the one that it has alone.

        ``settings`` is one SamplingConfig for each prompt, or one for all: then prompt i has seed
        + i. ``prefill_chunk`` is the number of prompt tokens in one forward pass. At most
        ``max_rows`` prompts (0: all) are continued at a time: the place of one that ends is
        given to the next.
        """
        each = _settings_of_each(settings, len(prompts))
        ids = [self.encode(prompt) for prompt in prompts]
        return self._complete(ids, each, prefill_chunk, max_rows)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        stop_tokens: tuple[str, ...] = (),
        ignore_eos: bool = False,
        logprobs: int = -1,
    ) -> Iterator[str]:
        """Yield the completion of one prompt piece by piece, in whole characters."""
        settings = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop,
            stop_tokens, ignore_eos, logprobs,
        )  # fmt: skip
        return self.stream_ids(self.encode(prompt), settings)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        stop_tokens: tuple[str, ...] = (),
        ignore_eos: bool = False,
        logprobs: int = -1,
    ) -> Completion:
        """Return the answer to a conversation, ``[{"role": "user", "content": "Hello"}]``."""
        settings = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop,
            stop_tokens, ignore_eos, logprobs,
        )  # fmt: skip
        return self._complete([self.chat_template.encode(messages)], [settings])[0]

    def chat_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        settings: SamplingConfig | Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
        max_rows: int = 0,
    ) -> list[Completion]:
        """Return the answers to several conversations; the arguments as for ``generate_batch``."""
        each = _settings_of_each(settings, len(conversations))
        rows = [self.chat_template.encode(messages) for messages in conversations]
        return self._complete(rows, each, prefill_chunk, max_rows)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        stop_tokens: tuple[str, ...] = (),
        ignore_eos: bool = False,
        logprobs: int = -1,
    ) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece, in whole characters."""
        settings = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop,
            stop_tokens, ignore_eos, logprobs,
        )  # fmt: skip
        return self.stream_ids(self.chat_template.encode(messages), settings)

    def stream_ids(
        self, ids: Sequence[int], settings: SamplingConfig, prefill_chunk: int = PREFILL_CHUNK
    ) -> Iterator[str]:
        """Yield the completion of a prompt's token ids piece by piece."""
        return self._stream_rows([ids], [self._builder(ids, settings)], prefill_chunk)

    def _complete(
        self,
        rows: Sequence[Sequence[int]],
        settings: Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
        max_rows: int = 0,
    ) -> list[Completion]:
        builders = [self._builder(row, s) for row, s in zip(rows, settings, strict=True)]
        for _ in self._stream_rows(rows, builders, prefill_chunk, max_rows):
            pass
        return [builder.build() for builder in builders]

    def _stream_rows(
        self,
        rows: Sequence[Sequence[int]],
        builders: Sequence[CompletionBuilder],
        prefill_chunk: int,
        max_rows: int = 0,
    ) -> Iterator[str]:
        """Continue all rows to their ends; yield each token's new text, rows interleaved."""
        if not rows:
            return
        settings, decoding = [builder.settings for builder in builders], self.decoding.decoding
        if self.draft is None:
            given = self.model, rows, settings, prefill_chunk, decoding, self.graphs
            batch = DecodeBatch(*given, max_rows=max_rows)
        elif len(rows) > 1:
            raise InputError("--draft is for one prompt at a time; give one, or leave it out")
        else:
            batch = speculative_batch(
                self.model, self.draft, rows[0], settings[0], prefill_chunk, decoding,
                self.decoding.guesses, self.graphs,
            )  # fmt: skip
        for token in generate_tokens(batch, lambda token: builders[token.prompt].add(token)):
            if piece := builders[token.prompt].pieces[-1]:
                yield piece

    def _builder(self, ids: Sequence[int], settings: SamplingConfig) -> CompletionBuilder:
        return CompletionBuilder(self.tokenizer, self.end_ids, ids, settings)


def _settings_of_each(
    settings: SamplingConfig | Sequence[SamplingConfig], number: int
) -> Sequence[SamplingConfig]:
    """Return the settings of each of ``number`` prompts; of one for all, prompt i has seed + i."""
    if isinstance(settings, SamplingConfig):
        return [replace(settings, seed=(settings.seed + i) % 2**63) for i in range(number)]
    if len(settings) != number:
        raise InputError(f"{number} prompts and {len(settings)} settings; give as many")
    return settings


def load(
    ckpt: str | Path,
    *,
    dtype: Dtype = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    template: str = "",
    quantize: Quantize = "none",
    decoding: Decoding = "auto",
    draft: str | Path = "",
    guesses: int = 4,
) -> TextModel:
    """Load a model directory (or .safetensors file) with its tokenizer.

    ``template`` is "llama2" or a Jinja file, for a checkpoint without a chat template; the
    others are the fields of LoadConfig and DecodingConfig. Raises InputError for an argument out
    of range, a file that cannot be read or is not supported, and a tokenizer that does not fit
    the model.
    """
    return load_from(
        LoadConfig(str(ckpt), device, dtype, quantize),
        template,
        DecodingConfig(decoding, str(draft or ""), guesses),
    )


def load_from(
    config: LoadConfig, template: str = "", decoding: DecodingConfig | None = None
) -> TextModel:
    """Load the model of ``config``, and the draft model of ``decoding``; see ``load``."""
    path, device = Path(config.ckpt), pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    model = load_model(path, dtype=dtype, device=device)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    quantize_model(model, config.quantize)
    draft = None
    if decoding and decoding.draft:
        draft = load_model(Path(decoding.draft), dtype=dtype, device=device)
    return TextModel(path, model, tokenizer, template, decoding, draft)
