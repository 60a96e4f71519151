"""Record in progress.json how far a text is tokenised, and check the record of a killed process."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_common.errors import InputError

from ..common.state_file import MOST, read_state, require_count, write_state
from .documents import TextPiece
from .formats import text_format
from .shard_check import scan
from .shards import (
    PROGRESS_FILE,
    Ids,
    Shard,
    parse_shards,
    require_fields,
    require_nulls,
    require_size,
    shard_name,
)
from .text_files import Text

Encoded = tuple[TextPiece, Ids, int]  # a piece, its ids and its number of nulls


@dataclass
class Progress:
    """The fields of progress.json: the shards written, and where the next one begins."""

    key: str
    shard_tokens: int
    highest: int = -1
    file: int = 0  # with start: the piece that holds the last token written
    start: int = 0
    skip: int = 0  # tokens of that piece already written
    nulls: int = 0  # records left out before that piece
    first_null_file: int = -1  # of the files with one, the first; -1 = none
    shards: tuple[Shard, ...] = ()


def another_text(folder: Path) -> InputError:
    """Return the error for a folder of other tokens than those asked for."""
    return InputError(
        f"{folder} holds the tokens of another text, or in shards of another size; choose "
        "another folder, or delete it"
    )


def write_progress(folder: Path, progress: Progress) -> None:
    """Write progress.json atomically."""
    write_state(folder / PROGRESS_FILE, asdict(progress))


def resume(folder: Path, text: Text, shard_tokens: int, dtype: str) -> Progress:
    """Return the progress of a killed process, or write that of one which begins.

    Raises InputError for shards of another text, and for a record that is damaged or does not fit
    the shards. One without a checksum, an earlier version's, is not believed: all begins anew.
    """
    path, fresh = folder / PROGRESS_FILE, Progress(text.key, shard_tokens)
    if path.is_file():
        found, has_checksum = read_state(path, _remedy(folder))
        if (found.get("key"), found.get("shard_tokens")) != (text.key, shard_tokens):
            raise another_text(folder)
        if has_checksum:
            return _checked(folder, found, text, dtype)
    elif (folder / shard_name(0)).exists():
        raise InputError(f"{folder} holds shards without an index; delete it, or choose another")
    write_progress(folder, fresh)
    return fresh


def _checked(folder: Path, found: dict[str, Any], text: Text, dtype: str) -> Progress:
    """Return the progress of a JSON object; raise InputError where it cannot be of the text."""
    try:
        require_fields(Progress, found)
        progress = Progress(**found | {"shards": parse_shards(found.get("shards"))})
        _require_possible(progress, text)
    except ValueError as error:
        raise _damaged(folder, str(error)) from None
    highest = -1
    for shard in progress.shards:
        require_size(folder, shard, np.dtype(dtype).itemsize)
        digest, highest_here = scan(folder / shard.name, dtype)
        if digest != shard.sha256:
            raise _damaged(folder, f"{shard.name} is not what was written")
        highest = max(highest, highest_here)
    if highest != progress.highest:
        raise _damaged(folder, f"highest is {progress.highest}, and the shards hold {highest}")
    return progress


def _require_possible(progress: Progress, text: Text) -> None:
    """Raise ValueError for numbers that no process writes."""
    if not progress.shards and progress != Progress(progress.key, progress.shard_tokens):
        raise ValueError("it is past the beginning, and names no shard")
    n_tokens = [shard.tokens for shard in progress.shards]
    if any(n != progress.shard_tokens for n in n_tokens[:-1]):
        raise ValueError("a shard before the last is not full")
    if n_tokens and n_tokens[-1] > progress.shard_tokens:
        raise ValueError("the last shard is more than full")
    is_begun = len(n_tokens) > 0
    require_count("highest", progress.highest, is_begun - 1, text.encoding.tokenizer.n_ids - 1)
    require_count("file", progress.file, 0, max(0, len(text.files) - 1))
    require_count("start", progress.start, 0, _last_start(text, progress.file))
    require_count("skip", progress.skip, int(is_begun), sum(n_tokens))
    require_nulls(progress.nulls, progress.first_null_file)
    require_count("first_null_file", progress.first_null_file, -1, progress.file)


def _last_start(text: Text, file: int) -> int:
    """Return a bound of the places in a file: its bytes, or any number of rows."""
    if not text.files:
        return 0
    return MOST if text_format(text.files[file]) == ".parquet" else text.sizes[file]


def continued(
    encoded: Iterator[Encoded], folder: Path, progress: Progress, dtype: str
) -> Iterator[Encoded]:
    """Yield the pieces from the one that holds the last token written.

    Raises InputError unless that token and those of the piece before it are what the shards end
    with: a place that is not where the process stopped would leave tokens out, or repeat them.
    """
    try:
        first = next(encoded, None)
    except InputError as error:
        if progress.skip:  # the text, which is the same, could be read there
            raise _damaged(folder, f"the text cannot be read where it says: {error}") from None
        raise
    if progress.skip:
        written = _last_ids(folder, progress, dtype)
        piece, ids, _ = first or (None, written[:0], 0)
        place = piece and (piece.file, piece.start)
        fits = np.array_equal(ids[: progress.skip], written)
        if place != (progress.file, progress.start) or not fits:
            raise _damaged(folder, "the shards do not end where it says")
    if first:
        yield first
    yield from encoded


def require_end(folder: Path, progress: Progress) -> None:
    """Raise InputError if the last shard is not full: the text has tokens after it."""
    if progress.shards and progress.shards[-1].tokens < progress.shard_tokens:
        raise _damaged(folder, "the last shard is not full, and more text follows")


def _last_ids(folder: Path, progress: Progress, dtype: str) -> Ids:
    """Return the last ``skip`` ids of the shards written."""
    parts: list[Ids] = []
    missing, width = progress.skip, np.dtype(dtype).itemsize
    for shard in reversed(progress.shards):
        first = max(0, shard.tokens - missing)
        parts.insert(0, np.fromfile(folder / shard.name, dtype, offset=first * width))
        missing -= shard.tokens - first
        if not missing:
            break
    return np.concatenate(parts)


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(f"{folder / PROGRESS_FILE}: damaged ({reason}); {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"delete {folder}, and run this again"
