"""Tokenise text into shards: ``python -m llama_torch.prepare --data texts/ --out DIR``."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llama_common import cli
from llama_common.errors import InputError, check, check_positive, printable, quoted
from llama_common.files import read_json

from .checkpoint.file_names import TOKENIZERS
from .data.text_files import find_files, identify, require_found
from .model.config import ModelConfig
from .tokenizer.encoding import GPT2, TextEncoding, load_encoding

if TYPE_CHECKING:
    from .data.shards import TokenShards


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenise text into a folder of shards, for --data of llama_torch.train."""

    command: ClassVar[str] = "python -m llama_torch.prepare"

    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt .md .jsonl, also .gz or .zst; .parquet); none = Python's own
    help topics."""
    text_field: str = "text"
    """Name of the text field in .jsonl and .parquet records."""
    tokenizer: str = ""
    """Model directory whose tokenizer encodes the text; empty = GPT-2's encoding."""
    out: str = ""
    """Folder to write; an earlier run that was stopped there is resumed."""
    workers: int = 0
    """Number of tokenising processes; 0 = one for each CPU core."""
    shard_tokens: int = 1 << 26
    """Tokens in a shard."""
    verify: str = ""
    """Folder of shards to verify against their checksums, and with --data against that text, which
    is tokenised again; nothing is written."""

    def __post_init__(self) -> None:
        check_positive(self, "shard_tokens")
        check(self.workers >= 0, "workers", self.workers, "must not be negative")
        needed = "is needed: name the folder to write (or one to check, with --verify)"
        check(bool(self.out or self.verify), "out", self.out, needed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    config = cli.parse(PrepareConfig, argv)
    if config.verify:
        return _verify(config)
    started, files = time.perf_counter(), find_files(config.data)
    text = identify(files, config.text_field, encoding_of(config))
    from .data.shard_writer import prepare  # imports NumPy: a wrong flag or --data is told before

    shards = prepare(text, Path(config.out), config.workers, config.shard_tokens)
    n = len(shards.index.shards)
    init = f"--init-from {quoted(config.tokenizer)} " if config.tokenizer else ""
    print(
        f"{printable(config.out)}: {len(shards):,} tokens in {n} shard{'s' * (n != 1)} of "
        f"{shards.index.dtype}, after {time.perf_counter() - started:.0f} s\n"
        f"next:\n  python -m llama_torch.train {init}--data {quoted(config.out)}"
    )
    return 0


def encoding_of(config: PrepareConfig) -> TextEncoding:
    """Return the encoding of --tokenizer, a model directory or one that holds a tokenizer alone.

    Raises InputError for a directory without a tokenizer, or with one that cannot be read.
    """
    if not config.tokenizer:
        return GPT2
    folder = Path(config.tokenizer)
    if not folder.is_dir():
        raise InputError(f"--tokenizer {folder}: no such directory; give a model's")
    path = folder / "config.json"
    if path.is_file():
        return load_encoding(folder, ModelConfig.from_hf(read_json(path), str(path)).vocab_size)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(f"--tokenizer {folder}: holds no tokenizer.json and no tokenizer.model")
    return load_encoding(folder)


def _verify(config: PrepareConfig) -> int:
    """Print where shards differ from their index, and from the text; return the exit code."""
    require_found(config.data)
    if not os.path.isdir(config.verify):
        raise InputError(f"--verify {config.verify}: no such folder; give one of token shards")
    from .data.shard_check import scan_shards
    from .data.shards import INDEX_FILE, TokenShards

    shards = TokenShards(Path(config.verify))
    index, folder = shards.index, shards.folder
    damaged, highest = scan_shards(shards)
    place = printable(str(folder))
    for name in damaged:
        print(f"{place}/{name}: is not what was written; its checksum differs")
    n_shards = len(index.shards)
    print(f"{place}: {n_shards - len(damaged)} of {n_shards} shards are as written")
    if damaged:
        return 1
    if highest != index.highest:
        print(f"{place}/{INDEX_FILE}: says that the highest id is {index.highest}, not {highest}")
        return 1
    return _verify_text(config, shards) if config.data else 0


def _verify_text(config: PrepareConfig, shards: "TokenShards") -> int:
    from .data.shard_check import first_difference
    from .data.shard_progress import another_text

    text = identify(find_files(config.data), config.text_field, encoding_of(config))
    if shards.index.key != text.key:
        raise another_text(shards.folder)
    at = first_difference(shards, text, config.workers)
    place = printable(str(shards.folder))
    if at is not None:
        print(f"{place}: token {at:,} is not the text's; delete the folder and tokenise again")
        return 1
    print(f"{place}: all {len(shards):,} tokens are the text's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
