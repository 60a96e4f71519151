"""Open the texts and token shards of --data, each split into training and validation tokens."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama_common.errors import InputError

from ..config import DataConfig
from ..tokenizer.encoding import GPT2, TextEncoding
from ..tokenizer.gpt2 import VOCAB_SIZE
from . import order
from .documents import Nulls
from .shard_writer import prepare
from .shards import INDEX_FILE, TokenShards, is_shards
from .text_files import find_files, identify

HELP_TOPICS = "Python's help topics (built in)"


class Tokens(Protocol):
    """A sequence of token ids; a slice is an array [stop - start]."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> NDArray[np.integer[Any]]: ...


class Part:
    """The token ids ``tokens[start:stop]``, read when sliced."""

    def __init__(self, tokens: Tokens, start: int, stop: int) -> None:
        self.tokens, self.start, self.stop = tokens, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, where: slice) -> NDArray[np.integer[Any]]:
        start, stop, _ = where.indices(len(self))
        return self.tokens[self.start + start : self.start + stop]


@dataclass(frozen=True)
class Source:
    """Token ids of one text, split into training and validation."""

    train: Tokens
    val: Tokens
    name: str  # for messages


@dataclass(frozen=True)
class Corpus:
    """The training data: one source, or several that windows are drawn from by weight."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]  # of each source; positive, not normalised
    key: str  # hash of the content and of the encoding


def load_corpus(
    config: DataConfig, vocab_size: int, context: int, encoding: TextEncoding = GPT2
) -> Corpus:
    """Open the configured texts, tokenised unless they are in the cache, and split each.

    Raises InputError for text that cannot be read, shards of another tokenizer, token ids outside
    the vocabulary, and a training or validation part shorter than one window of ``context`` + 1
    tokens.
    """
    names = [(name,) for name in config.data] if config.weights else [config.data]
    shards = [_open(config, patterns, encoding) for patterns in names]
    sources = []
    for patterns, tokens in zip(names, shards, strict=True):
        name = ", ".join(patterns) or HELP_TOPICS
        _require_in_vocabulary(tokens, vocab_size, name)
        n_train = len(tokens) - int(len(tokens) * config.val_fraction)
        train, val = Part(tokens, 0, n_train), Part(tokens, n_train, len(tokens))
        for part, kind in ((train, "training"), (val, "validation")):
            _require_long_enough(part, context, f"{kind} part of {name}")
        sources.append(Source(train, val, name))
    keys = [tokens.index.key for tokens in shards]
    key = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:32] if config.weights else keys[0]
    return Corpus(tuple(sources), config.weights or (1.0,), key)


def _open(config: DataConfig, patterns: Sequence[str], encoding: TextEncoding) -> TokenShards:
    """Return the token shards of a folder, or of the text files that ``patterns`` name."""
    folders = [name for name in patterns if name and is_shards(Path(name))]
    if folders and len(patterns) > 1:
        raise InputError(
            f"--data {folders[0]} holds token shards and cannot be joined to other text; leave "
            "it alone, or say with --weights how to mix them"
        )
    if folders:
        tokens = TokenShards(Path(folders[0]))
        _require_encoding(tokens, encoding)
        Nulls(tokens.index.nulls, tokens.index.first_null_file).print(())
        return tokens
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(config.cache_dir) if config.cache_dir else home / "llama_torch"
    text = identify(find_files(patterns), config.text_field, encoding)
    return prepare(text, cache / text.key)


def _require_encoding(tokens: TokenShards, encoding: TextEncoding) -> None:
    if tokens.index.encoding != encoding.sha256:
        raise InputError(
            f"{tokens.folder / INDEX_FILE}: holds ids of another tokenizer than {encoding.name}; "
            f"tokenise the text with python -m llama_torch.prepare{encoding.flag}"
            + ("" if encoding.directory else ", or begin with --init-from the tokenizer's model")
        )


def _require_in_vocabulary(tokens: TokenShards, vocab_size: int, name: str) -> None:
    highest = tokens.index.highest
    if highest >= vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is too small: {name} holds token id {highest}; "
            f"use at least {highest + 1} (the GPT-2 encoding has {VOCAB_SIZE})"
        )


def _require_long_enough(part: Tokens, context: int, name: str) -> None:
    if len(part) < context + 1:
        raise InputError(
            f"--max-seq-len {context} needs {context + 1} tokens and the {name} has {len(part)}; "
            "give more text with --data, or change --max-seq-len or --val-fraction"
        )


def describe(corpus: Corpus) -> str:
    """Return a line with each source's name and its training and validation token counts."""
    return "; ".join(
        (f"{float(share):.1%} " if len(corpus.sources) > 1 else "")
        + f"{source.name}: {len(source.train):,} training tokens, {len(source.val):,} held out"
        for source, share in zip(corpus.sources, order.shares(corpus.weights), strict=True)
    )
