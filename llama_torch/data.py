"""From text to batches: documents, a memory-mapped token cache, and windows in a fixed order."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .checkpoint import atomic_write
from .config import DataConfig, InputError
from .stopping import leave_to_parent
from .tokenizer import END_OF_TEXT_ID, RANKS_SHA256, gpt2

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
# Part of every cache key: change it with anything that changes the tokens of a text.
CACHE_VERSION = "1"


@dataclass(frozen=True)
class Corpus:
    """Token ids of a text, split in two; both parts are read-only memory maps."""

    train: NDArray[np.integer[Any]]
    val: NDArray[np.integer[Any]]
    key: str  # hash of the content and of the encoding
    name: str  # for people


def load_corpus(config: DataConfig, vocab_size: int, context: int) -> Corpus:
    """Tokenise the configured text (once; later runs map the cached ids) and split it.

    Raises InputError for text that cannot be read, token ids outside the vocabulary, and a
    train or validation part shorter than one window of ``context`` + 1 tokens.
    """
    files = find_files(config.data)
    key = _content_key(files, config.text_field)
    tokens = _map_cached(config, key, files)
    highest = int(tokens.max(initial=0))
    if highest >= vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is too small: the text holds token id {highest}; "
            f"use at least {highest + 1} (the GPT-2 encoding has {gpt2().n_vocab})"
        )
    n_val = int(len(tokens) * config.val_fraction)
    train, val = tokens[: len(tokens) - n_val], tokens[len(tokens) - n_val :]
    for part, name in ((train, "training"), (val, "validation")):
        if len(part) < context + 1:
            raise InputError(
                f"--max-seq-len {context} needs {context + 1} tokens and the {name} part has "
                f"{len(part)}; give more text with --data, or change --max-seq-len or "
                "--val-fraction"
            )
    return Corpus(train, val, key, ", ".join(config.data) or "Python's help topics (built in)")


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Expand files, folders and globs to text files in sorted order, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if not pattern:
            raise InputError("--data '' names nothing; give a file, a folder or a glob")
        if path.is_dir():
            matches = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            raise InputError(
                f"--data {pattern}: no file found; give a file, a folder that holds "
                f"{' '.join(SUFFIXES)} files, or a glob"
            )
        found |= dict.fromkeys(matches)
    wrong = [str(path) for path in found if path.suffix not in SUFFIXES]
    if wrong:
        raise InputError(
            f"--data {wrong[0]}: not one of {' '.join(SUFFIXES)}; rename or convert it"
        )
    return list(found)


def documents(files: Sequence[Path], text_field: str) -> Iterator[str]:
    """Yield the text of every document; without files, of every help topic of Python.

    The topics lose their indentation and runs of spaces: GPT-2 spends a token on each space,
    and a model that has learnt mostly to indent has a low loss and little to say.
    """
    if not files:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            lines = (" ".join(line.split()) for line in topics[name].splitlines())
            yield "\n".join(lines)
    for path in files:
        try:
            if path.suffix == ".parquet":
                yield from _parquet_texts(path, text_field)
            elif path.suffix == ".jsonl":
                yield from _jsonl_texts(path, text_field)
            else:
                yield path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--data {path}: cannot be read as UTF-8 ({error})") from None


def _jsonl_texts(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise InputError(
                    f"--data {path}: line {number} is not a JSON object with a text in "
                    f"{text_field!r}; fix the line or name the field with --text-field"
                )
            yield text


def _parquet_texts(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"--data {path}: reading .parquet needs pyarrow; pip install 'llama-parity[parquet]'"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(columns=[text_field]):
            yield from (text for text in batch.column(text_field).to_pylist() if text)
    except (pyarrow.ArrowException, KeyError) as error:
        raise InputError(
            f"--data {path}: not a parquet file with a text column {text_field!r} "
            f"({error}); name the column with --text-field"
        ) from None


def _content_key(files: Sequence[Path], text_field: str) -> str:
    """Hash what decides the tokens: every file's bytes in order, and how they are read."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {RANKS_SHA256}".encode())
    if not files:
        for text in documents((), text_field):
            digest.update(hashlib.sha256(text.encode()).digest())
    for path in files:
        structured = path.suffix in (".jsonl", ".parquet")
        digest.update(f"{path.suffix} {text_field if structured else ''}".encode())
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"--data {path}: cannot be read ({error})") from None
    return digest.hexdigest()[:32]


def _map_cached(config: DataConfig, key: str, files: Sequence[Path]) -> NDArray[np.integer[Any]]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(config.cache_dir) if config.cache_dir else home / "llama_torch"
    path = folder / f"{key}.npy"
    if not path.is_file():
        tokens = _encode(documents(files, config.text_field))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda temporary: _save_array(temporary, tokens))
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written ({error}); choose another --cache-dir"
            ) from None
    try:
        mapped: NDArray[np.integer[Any]] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged token cache ({error}); delete the file") from None
    return mapped


def _encode(texts: Iterator[str]) -> NDArray[np.uint16]:
    """Encode every document, ended by <|endoftext|>; GPT-2's ids fit 16 bits."""
    encoding = gpt2()
    parts = [np.zeros(0, np.uint16)]
    for text in texts:
        ids = encoding.encode_ordinary(text)
        if ids:
            parts.append(np.array([*ids, END_OF_TEXT_ID], dtype=np.uint16))
    return np.concatenate(parts)


def _save_array(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array)


class Windows(Dataset[Tensor]):
    """Slices of ``context`` + 1 tokens, indexed by where they start."""

    def __init__(self, tokens: NDArray[np.integer[Any]], context: int) -> None:
        self.tokens, self.context = tokens, context

    def __getitem__(self, start: int) -> Tensor:
        window = self.tokens[start : start + self.context + 1]
        return torch.from_numpy(window.astype(np.int64))


def window_start(n_tokens: int, context: int, seed: int, index: int) -> int:
    """Return where the ``index``-th training window starts: a pure function of its arguments.

    Each epoch visits disjoint windows once, in its own order and from its own offset, so
    that window borders move between epochs.
    """
    per_epoch = max(1, (n_tokens - 1) // context - 1)
    epoch, place = divmod(index, per_epoch)
    offset, order = _epoch_order(n_tokens - 1 - per_epoch * context, per_epoch, seed, epoch)
    return offset + int(order[place]) * context


_ORDERS: dict[tuple[int, int, int, int], tuple[int, NDArray[np.int64]]] = {}


def _epoch_order(slack: int, windows: int, seed: int, epoch: int) -> tuple[int, NDArray[np.int64]]:
    key = (slack, windows, seed, epoch)
    if key not in _ORDERS:
        rng = np.random.default_rng([seed, epoch])
        _ORDERS.clear()  # only the current epoch is worth its memory
        _ORDERS[key] = (int(rng.integers(slack + 1)), rng.permutation(windows))
    return _ORDERS[key]


class StepSampler(Sampler[list[int]]):
    """The window starts of each step from ``first`` on; ``rows`` windows a step."""

    def __init__(
        self, n_tokens: int, context: int, seed: int, rows: int, first: int, last: int
    ) -> None:
        self.where = (n_tokens, context, seed)
        self.rows, self.first, self.last = rows, first, last

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            indices = range(step * self.rows, (step + 1) * self.rows)
            yield [window_start(*self.where, index) for index in indices]

    def __len__(self) -> int:
        return self.last - self.first


def train_batches(
    corpus: Corpus, context: int, *, seed: int, rows: int, first: int, last: int, workers: int
) -> Iterator[Tensor]:
    """Yield int64 [rows, context + 1] for every step of ``range(first, last)``."""
    sampler = StepSampler(len(corpus.train), context, seed, rows, first, last)
    windows = Windows(corpus.train, context)
    return iter(
        DataLoader(
            windows, batch_sampler=sampler, num_workers=workers, worker_init_fn=leave_to_parent
        )
    )


def val_batches(corpus: Corpus, context: int, rows: int, most: int) -> list[Tensor]:
    """Return validation windows, the same each time: all, or ``most`` batches spread out."""
    starts = np.arange(0, len(corpus.val) - context, context)
    if most and len(starts) > most * rows:
        starts = starts[np.linspace(0, len(starts) - 1, most * rows).astype(int)]
    windows = Windows(corpus.val, context)
    return [
        torch.stack([windows[int(start)] for start in starts[i : i + rows]])
        for i in range(0, len(starts), rows)
    ]


def describe(corpus: Corpus) -> str:
    """Return one line about the corpus for people."""
    return f"{corpus.name}: {len(corpus.train):,} training tokens, {len(corpus.val):,} held out"
