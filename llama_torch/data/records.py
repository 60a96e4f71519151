"""Read files of records, objects of JSON or rows of Parquet, with the place of each."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_common.errors import InputError

from .documents import BOM, LONGEST, PIECE, ROWS
from .formats import STRUCTURED, is_compressed, open_decompressed, text_format
from .text_files import DATA, find_files, named_by


class Record(NamedTuple):
    """An object of a file."""

    content: dict[str, Any]
    place: str  # the flag, the file and the line or row, for messages


def records(patterns: Sequence[str], flag: str = DATA) -> Iterator[Record]:
    """Yield the records of files, folders and globs that ``flag`` names, in order.

    Raises InputError for what is no file of records and for a line that is no object.
    """
    with named_by(flag):
        for path in find_files(patterns):
            if text_format(path) not in STRUCTURED:
                raise InputError(f"{flag} {path}: is not .jsonl or .parquet; leave it out")
            read = _parquet if text_format(path) == ".parquet" else _json_lines
            yield from read(path, f"{flag} {path}")


def _json_lines(path: Path, name: str) -> Iterator[Record]:
    with open_decompressed(path) as file:
        number = 0
        while line := file.readline(LONGEST if is_compressed(path) else -1):
            number += 1
            place = f"{name}: line {number}"
            if is_compressed(path) and len(line) == LONGEST and not line.endswith(b"\n"):
                raise InputError(
                    f"{place} is longer than {LONGEST:,} bytes; decompress the file if that is "
                    "right, or leave it out"
                )
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode())
            except UnicodeDecodeError as error:
                message = f"{place} cannot be read as UTF-8 ({error.reason}); convert it"
                raise InputError(message) from None
            except (ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                raise InputError(f"{place} is not a JSON object; fix the line")
            yield Record(content, place)


def _parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{name}: reading .parquet needs pyarrow; pip install 'llama-parity[parquet]'"
        ) from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False)
        for batch in table.iter_batches(ROWS, use_threads=False):
            for content in batch.to_pylist():
                number += 1
                yield Record(_without_nulls(content), f"{name}: row {number}")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: a text of the rows from {number + 1} on cannot be read as UTF-8 "
            f"({error.reason}); convert it"
        ) from None
    except OverflowError as error:  # a date, of any column, that Python's have no years for
        raise InputError(
            f"{name}: a value of the rows from {number + 1} on cannot be read ({error}); correct "
            "it, or drop its column"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{name}: not a parquet file that can be read ({error}); copy it again, or leave it out"
        ) from None


def _without_nulls(value: Any) -> Any:
    """Return a row without the keys that are null: in a column of objects all have every key."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
