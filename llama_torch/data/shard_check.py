"""Check token shards against their index, and against the text."""

import hashlib
from contextlib import closing
from pathlib import Path

import numpy as np

from . import documents
from .shards import TokenShards
from .text_files import Text, require_unchanged
from .tokenising import encoded, progress_bar

CHUNK = 1 << 24  # bytes of a shard read at a time


def scan(path: Path, dtype: str) -> tuple[str, int]:
    """Return the SHA-256 of a shard's file, in hex, and its highest id, or -1 without one."""
    digest, highest = hashlib.sha256(), -1
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            ids = np.frombuffer(data[: len(data) - len(data) % np.dtype(dtype).itemsize], dtype)
            highest = max(highest, int(ids.max(initial=0)))
    return digest.hexdigest(), highest


def damaged_shards(shards: TokenShards) -> list[str]:
    """Return the names of the shards whose checksum is not the index's; reads every shard."""
    return scan_shards(shards)[0]


def scan_shards(shards: TokenShards) -> tuple[list[str], int]:
    """Return the names of the shards whose checksum is not the index's, and the highest id."""
    damaged, highest = [], -1
    for shard in shards.index.shards:
        digest, highest_here = scan(shards.folder / shard.name, shards.dtype.str)
        highest = max(highest, highest_here)
        if digest != shard.sha256:
            damaged.append(shard.name)
    return damaged, highest


def first_difference(shards: TokenShards, text: Text, workers: int = 0) -> int | None:
    """Tokenise the text again; return the first token in which the shards differ, or None.

    Raises InputError for text that cannot be read.
    """
    at = 0
    pieces = documents.pieces(text.files, text.text_field)
    with progress_bar(text) as advance, closing(encoded(text, pieces, workers, advance)) as parts:
        for _, ids, _ in parts:
            written = shards[at : at + len(ids)]
            if not np.array_equal(written, ids):
                same = np.flatnonzero(written != ids[: len(written)])
                return at + int(same[0] if len(same) else len(written))
            at += len(ids)
    require_unchanged(text)
    return None if at == len(shards) else at
