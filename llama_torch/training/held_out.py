"""Find the text that a run held out for validation, as documents that ``evaluate`` can score."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_common.errors import InputError
from llama_common.settings import build

from ..checkpoint.file_names import RUN_FILE
from ..checkpoint.step_folders import BEST
from ..config import DataConfig, TrainConfig
from ..data.corpus import Corpus, Tokens, load_corpus
from ..model.config import ModelConfig
from ..tokenizer.tokenizer import Tokenizer
from .origin import recorded_encoding
from .run_dir import find_again
from .run_file import read_run, require_consistent

CHUNK = 1 << 20  # token ids read at a time


def find_run(ckpt: Path) -> Path | None:
    """Return the run directory that a checkpoint belongs to; None if it belongs to no run.

    ``ckpt`` is the run directory, its best/, or a file in one of them.
    """
    if not ckpt.exists():
        return None
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    if Path(os.path.abspath(folder)).name == BEST and not (folder / RUN_FILE).is_file():
        folder = folder.parent if folder.name else folder / ".."
    return folder if (folder / RUN_FILE).is_file() else None


def load_held_out(run: Path) -> Corpus:
    """Open the text of a run, split as the run split it.

    A relative --data is looked for as --resume looks for it. Raises InputError where the text is
    gone or has changed, as part of it may have been trained on then.
    """
    record = read_run(run)
    if record.config_class is not TrainConfig:
        raise InputError(
            f"{record.path}: its held-out part is of conversations, not of text; name a text with "
            "--data"
        )
    config, model = build(DataConfig, record.settings), build(ModelConfig, record.settings)
    require_consistent(record)
    encoding = recorded_encoding(record)
    names = (find_again(name, record.directory, str(record.path)) for name in config.data)
    config = dataclasses.replace(config, data=tuple(names))
    corpus = load_corpus(config, model.vocab_size, model.max_seq_len, encoding)
    if corpus.key != record.data_key:
        raise InputError(
            f"{record.path}: the text of its --data has changed, and the part that was held out "
            "is not known; name a text with --data"
        )
    return corpus


def describe_held_out(corpus: Corpus) -> str:
    """Return the names of the held-out texts, with their numbers of tokens."""
    parts = ", ".join(f"{source.name} ({len(source.val):,} tokens)" for source in corpus.sources)
    return f"the part that the run held out of {parts}"


def held_out_documents(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the documents of the held-out parts; the first of each part may have lost its head."""
    for source in corpus.sources:
        yield from _documents(source.val, tokenizer)


def _documents(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts between the end tokens of ``tokens``."""
    end = tokenizer.special[tokenizer.eos] if tokenizer.eos else -1
    begun: list[int] = []
    is_cut = True
    for start in range(0, len(tokens), CHUNK):
        ids = tokens[start : start + CHUNK]
        parts = np.split(ids, np.flatnonzero(ids == end) + 1)
        for part in parts[:-1]:
            yield _text([*begun, *part[:-1].tolist()], tokenizer, is_cut)
            begun, is_cut = [], False
        begun += parts[-1].tolist()
    if begun:
        yield _text(begun, tokenizer, is_cut)


def _text(ids: list[int], tokenizer: Tokenizer, is_cut: bool) -> str:
    """Return the text of ids; one that ``is_cut`` may begin within a character."""
    text = tokenizer.decode(ids)
    return text.lstrip("\N{REPLACEMENT CHARACTER}") if is_cut else text
