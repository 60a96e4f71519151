"""The Python interface: a model, its tokenizer and its chat template, loaded together.

::

    from llama_torch import load
    model = load("runs/1")
    print(model.generate("The", max_new_tokens=40).text)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint.hf import load_model
from ..common.device import pick_device
from ..common.errors import InputError, has_surrogates
from ..model.llama import Llama
from ..tokenizer.chat_template import ChatTemplate, Llama2Template, Message, load_chat_template
from ..tokenizer.detokenizer import TextStream
from ..tokenizer.gpt2 import located
from ..tokenizer.loading import end_ids, load_tokenizer
from ..tokenizer.tokenizer import Tokenizer
from .config import (
    PREFILL_CHUNK,
    Decoding,
    DecodingConfig,
    Dtype,
    LoadConfig,
    Quantize,
    SamplingConfig,
)
from .engine import Batch, Token, run
from .quantization import quantize as quantize_model
from .speculative import Speculative


@dataclass(frozen=True)
class Completion:
    """What was written after one prompt."""

    text: str  # without the prompt, end tokens and stop texts
    tokens: tuple[Token, ...]  # all drawn, with their log-probabilities where asked for
    finish_reason: Literal["stop", "length"]


class TextModel:
    """A language model that takes and gives text. Made by ``load``.

    Every method takes the fields of SamplingConfig as keyword arguments, and raises InputError
    for settings and prompts that cannot be honoured.
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
        self.end_ids = end_ids(ckpt, tokenizer, model.config.vocab_size)

    @cached_property
    def chat_template(self) -> ChatTemplate | Llama2Template:
        """What turns a conversation into ids; InputError where the checkpoint has none."""
        return load_chat_template(self.ckpt, self.tokenizer, self._template)

    def encode(self, prompt: str) -> list[int]:
        """Return a prompt's ids, one BOS first where the checkpoint was trained with it."""
        if has_surrogates(prompt):
            raise InputError("the prompt is not valid text; correct it")
        with located(f"--prompt {prompt[:20]!r}"):
            return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)]

    def generate(self, prompt: str, **settings: Any) -> Completion:
        """Continue one prompt."""
        return self._complete([self.encode(prompt)], [SamplingConfig(**settings)])[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        settings: SamplingConfig | Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> list[Completion]:
        """Continue prompts of any lengths together, each as it would be alone.

        With one SamplingConfig for all, each prompt's seed is one more than the last one's.
        """
        if isinstance(settings, SamplingConfig):
            settings = [
                replace(settings, seed=(settings.seed + i) % 2**63) for i in range(len(prompts))
            ]
        if len(settings) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(settings)} settings; give as many")
        return self._complete([self.encode(prompt) for prompt in prompts], settings, prefill_chunk)

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """Yield the continuation of one prompt as it is written, in whole characters."""
        return self.stream_ids(self.encode(prompt), SamplingConfig(**settings))

    def chat(self, messages: Sequence[Message], **settings: Any) -> Completion:
        """Answer a conversation: ``[{"role": "user", "content": "Hello"}]``."""
        ids = self.chat_template.encode(messages)
        return self._complete([ids], [SamplingConfig(**settings)])[0]

    def stream_chat(self, messages: Sequence[Message], **settings: Any) -> Iterator[str]:
        """Yield the answer to a conversation as it is written."""
        return self.stream_ids(self.chat_template.encode(messages), SamplingConfig(**settings))

    def stream_ids(
        self, ids: Sequence[int], settings: SamplingConfig, prefill_chunk: int = PREFILL_CHUNK
    ) -> Iterator[str]:
        """Yield the text that continues token ids."""
        return self._written([ids], [Writer(self, ids, settings)], prefill_chunk)

    def _complete(
        self,
        rows: Sequence[Sequence[int]],
        settings: Sequence[SamplingConfig],
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> list[Completion]:
        writers = [Writer(self, row, s) for row, s in zip(rows, settings, strict=True)]
        for _ in self._written(rows, writers, prefill_chunk):
            pass
        return [writer.completion() for writer in writers]

    def _written(
        self, rows: Sequence[Sequence[int]], writers: Sequence["Writer"], prefill_chunk: int
    ) -> Iterator[str]:
        """Continue all rows to their ends; yield the new text of each token, rows mixed."""
        if not rows:
            return
        settings, way = [writer.settings for writer in writers], self.decoding.decoding
        if self.draft is None:
            batch = Batch(self.model, rows, settings, prefill_chunk, way)
        elif len(rows) > 1:
            raise InputError("--draft is for one prompt at a time; give one, or leave it out")
        else:
            batch = Speculative(
                self.model, self.draft, rows[0], settings[0], prefill_chunk, way,
                self.decoding.guesses,
            )  # fmt: skip
        for token in run(batch, lambda token: writers[token.row].take(token)):
            if piece := writers[token.row].pieces[-1]:
                yield piece


class Writer:
    """One row's text so far, and whether it has ended."""

    def __init__(self, model: TextModel, ids: Sequence[int], settings: SamplingConfig) -> None:
        self.settings = settings
        self.stream = TextStream(model.tokenizer, ids, settings.stop)
        self.stops = set() if settings.ignore_eos else set(model.end_ids)
        self.stops |= {model.tokenizer.token_id(t, "--stop-tokens") for t in settings.stop_tokens}
        self.pieces: list[str] = []
        self.tokens: list[Token] = []
        self.finish_reason: Literal["stop", "length"] | None = None

    def take(self, token: Token) -> bool:
        """Add a token and its text; return whether it is one that ends the row."""
        self.tokens.append(token)
        piece = "" if token.id in self.stops else self.stream.push(token.id)
        ended = token.id in self.stops or self.stream.stopped
        if ended or token.last:
            piece += "" if self.stream.stopped else self.stream.finish()
            # What was held back may have held a stop text.
            self.finish_reason = "stop" if ended or self.stream.stopped else "length"
        self.pieces.append(piece)
        return ended

    def completion(self) -> Completion:
        """Return the whole."""
        assert self.finish_reason is not None
        return Completion("".join(self.pieces), tuple(self.tokens), self.finish_reason)


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
    others are the fields of LoadConfig and DecodingConfig. Raises InputError for whatever
    cannot be read or does not fit together.
    """
    return load_from(
        LoadConfig(str(ckpt), device, dtype, quantize),
        template,
        DecodingConfig(decoding, str(draft or ""), guesses),
    )


def load_from(
    config: LoadConfig, template: str = "", decoding: DecodingConfig | None = None
) -> TextModel:
    """Load what the command line's flags name."""
    path, device = Path(config.ckpt), pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    model = load_model(path, dtype=dtype, device=device)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    if config.quantize == "int8":
        quantize_model(model)
    draft = None
    if decoding and decoding.draft:
        draft = load_model(Path(decoding.draft), dtype=dtype, device=device)
    return TextModel(path, model, tokenizer, template, decoding, draft)
