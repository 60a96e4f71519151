"""Tell the formats of text files by their endings, and read their bytes decompressed."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llama_common.errors import InputError

FORMATS = (".txt", ".md", ".jsonl", ".parquet")
STRUCTURED = (".jsonl", ".parquet")  # of many records, each a document
COMPRESSIONS = (".gz", ".zst")
# .parquet is compressed inside, and is not read from its start to its end.
ENDINGS = frozenset({*FORMATS, *(f + c for f in FORMATS if f != ".parquet" for c in COMPRESSIONS)})
READABLE = f"{' '.join(FORMATS)} (all but .parquet also as {' or '.join(COMPRESSIONS)})"


def ending(path: Path) -> str:
    """Return a file's ending in lower case, ".txt" or ".txt.gz"; empty without one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if "".join(suffixes[-1:]) in COMPRESSIONS else suffixes[-1:])


def text_format(path: Path) -> str:
    """Return the format of a file's decompressed bytes, one of FORMATS."""
    return ending(path).removesuffix(".gz").removesuffix(".zst")


def decompressed_name(path: Path) -> Path:
    """Return a compressed file's path without the ending of its compression, or else its path."""
    return path.with_suffix("") if is_compressed(path) else path


def is_compressed(path: Path) -> bool:
    """Return whether a file is read decompressed."""
    return ending(path).endswith(COMPRESSIONS)


@contextmanager
def open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for its bytes, decompressed as they are read if it ends in .gz or .zst.

    Raises InputError, in the body too, for a file that cannot be read or decompressed.
    """
    zstd = _zstd(path) if ending(path).endswith(".zst") else None
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if zstd:
        damage = (*damage, zstd.ZstdError)
    try:
        if is_compressed(path) and path.stat().st_size == 0:
            raise EOFError("it is empty")
        opener: Any = zstd.open if zstd else gzip.open if is_compressed(path) else open
        with opener(path, "rb") as file:
            yield file
    except damage as error:
        # zstd's own default limit, 128 MiB, bounds the memory that a file can ask for.
        needs_memory = "too much memory" in str(error)
        remedy = (
            f"decompress it beforehand (zstd -d --long=31 {path})"
            if needs_memory
            else "copy it again, or leave it out"
        )
        raise InputError(f"--data {path}: cannot be decompressed ({error}); {remedy}") from None
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error})") from None


def _zstd(path: Path) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise InputError(
            f"--data {path}: reading .zst needs backports.zstd; pip install 'llama-parity[zstd]'"
        ) from None
    return zstd


def lines_before(path: Path, offset: int) -> int:
    """Return the number of line breaks in a file's first ``offset`` bytes, decompressed."""
    part = 1 << 20
    with open_decompressed(path) as file:
        return sum(file.read(min(part, offset - at)).count(b"\n") for at in range(0, offset, part))
