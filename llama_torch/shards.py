"""Token shards: a folder of ids in files of one size, and an index.json that describes them.

A shard is plain little-endian ids, uint16 where the vocabulary fits and uint32 otherwise, without
a header. Preparing one writes shards in order, each whole or not at all, and after each what is
done to progress.json; index.json comes last. A preparation that was killed goes on from there.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import progress as rich_progress
from rich.console import Console

from . import documents
from .checkpoint import atomic_write, write_text
from .config import InputError, read_json
from .documents import Piece, Text
from .tokenizer import RANKS_SHA256, gpt2

FORMAT, VERSION = "llama_torch token shards", 1
INDEX_FILE, PROGRESS_FILE, LOCK_FILE = "index.json", "progress.json", "lock"
SHARD_TOKENS = 1 << 26
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
OPEN = 64  # shards that are open at a time

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Shard:
    """One file of the folder."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    dtype: str
    encoding: str  # hash of the encoding's ranks
    key: str  # hash of the text and of the encoding
    shard_tokens: int  # of every shard but the last, which may have fewer
    tokens: int
    highest: int  # id; -1 without tokens
    shards: tuple[Shard, ...]


class Shards:
    """A folder's ids as one sequence, read from the disk where they are asked for.

    ``shards[start:stop]`` reads with os.pread: of a mapped file that shrinks, reading would end
    the process by SIGBUS, and here it is an InputError. Raises InputError at once where a file
    is not as the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.dtype = np.dtype(DTYPES[self.index.dtype])
        self._open: OrderedDict[int, int] = OrderedDict()
        for shard in self.index.shards:
            _require_size(folder, shard, self.dtype.itemsize)

    def __len__(self) -> int:
        return self.index.tokens

    def __getitem__(self, where: slice) -> Ids:
        start, stop, _ = where.indices(len(self))
        size, parts = self.index.shard_tokens, [np.zeros(0, self.dtype)]
        while start < stop:
            number, first = divmod(start, size)
            last = min(first + stop - start, size)
            parts.append(self._read(number, first, last))
            start += last - first
        return np.concatenate(parts[1:]) if len(parts) > 2 else parts[-1]

    def _read(self, number: int, first: int, last: int) -> Ids:
        shard, width = self.index.shards[number], self.dtype.itemsize
        try:
            data = os.pread(self._handle(number), (last - first) * width, first * width)
        except OSError as error:
            raise _unusable(self.folder / shard.name, f"cannot be read ({error})") from None
        if len(data) < (last - first) * width:
            raise _unusable(self.folder / shard.name, "was cut short while it was in use")
        return np.frombuffer(data, self.dtype)

    def _handle(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) == OPEN:
            os.close(self._open.popitem(last=False)[1])
        shard = self.index.shards[number]
        _require_size(self.folder, shard, self.dtype.itemsize)
        self._open[number] = os.open(self.folder / shard.name, os.O_RDONLY)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # handles are of this process

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            os.close(handle)


def _require_size(folder: Path, shard: Shard, width: int) -> None:
    path, expected = folder / shard.name, shard.tokens * width
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None
    if found != expected:
        raise _unusable(path, f"has {found} bytes and should have {expected}")


def _unusable(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: token shard {what}; copy it back, or delete {path.parent} and tokenise again"
    )


def is_shards(folder: Path) -> bool:
    """Return whether a folder holds shards, or the beginning of some; the index may be damaged."""
    if (folder / PROGRESS_FILE).is_file() or (folder / _shard_name(0)).is_file():
        return True
    try:
        return read_json(folder / INDEX_FILE).get("format") == FORMAT
    except InputError:
        return False


def read_index(folder: Path) -> Index:
    """Read and check index.json; InputError names what is wrong with it."""
    path = folder / INDEX_FILE
    if not path.is_file() and (folder / PROGRESS_FILE).is_file():
        raise InputError(
            f"{folder}: its text is not wholly tokenised; run the command that began it again"
        )
    try:
        found = read_json(path)
        if (found.pop("format", None), found.pop("version", None)) != (FORMAT, VERSION):
            raise InputError(f"{path}: is not of format {FORMAT!r} {VERSION}; tokenise the text")
        index = Index(**found | {"shards": tuple(Shard(**shard) for shard in found["shards"])})
        _require_consistent(index)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: damaged index ({error}); copy it back, or delete {folder} and tokenise again"
        ) from None
    if index.encoding != RANKS_SHA256:
        raise InputError(f"{path}: holds ids of another encoding than GPT-2's; tokenise the text")
    return index


def _require_consistent(index: Index) -> None:
    """Raise ValueError where an index contradicts itself."""
    for name, kind in Index.__annotations__.items():
        if kind in (int, str) and type(getattr(index, name)) is not kind:
            raise ValueError(f"{name} is {getattr(index, name)!r}")
    if index.dtype not in DTYPES or index.shard_tokens < 1:
        raise ValueError(f"dtype {index.dtype!r}, {index.shard_tokens} tokens a shard")
    whole, rest = divmod(index.tokens, index.shard_tokens)
    expected = [index.shard_tokens] * whole + [rest] * (rest > 0)
    if [shard.tokens for shard in index.shards] != expected:
        raise ValueError(f"its shards do not add up to {index.tokens} tokens")
    if [shard.name for shard in index.shards] != [_shard_name(i) for i in range(len(expected))]:
        raise ValueError("its shards are not named in order")


def _shard_name(number: int) -> str:
    return f"{number:05d}.bin"


def damaged_shards(shards: Shards) -> list[str]:
    """Read every shard; return the names of those that have another checksum than the index."""
    found = []
    for shard in shards.index.shards:
        with (shards.folder / shard.name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                found.append(shard.name)
    return found


def prepare(text: Text, folder: Path, workers: int = 0, shard_tokens: int = SHARD_TOKENS) -> Shards:
    """Tokenise a text into a folder, or what is not yet there of it; 0 workers = one a core.

    The files are the same whatever the number of workers, and however often this was killed. Of
    two that prepare one folder at once, the second waits for the first. Raises InputError for a
    folder that holds another text, or that cannot be written, and text that cannot be read.
    """
    try:
        if not (folder / INDEX_FILE).is_file() or (folder / PROGRESS_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder) as lock:
                if not (folder / INDEX_FILE).is_file():
                    _fill(folder, text, workers, shard_tokens, lock)
                (folder / PROGRESS_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error}); choose another folder (a trainer's is below "
            "--cache-dir), or make room and run this again"
        ) from None
    shards = Shards(folder)
    if (shards.index.key, shards.index.shard_tokens) != (text.key, shard_tokens):
        raise _another_text(folder)
    return shards


def _another_text(folder: Path) -> InputError:
    return InputError(
        f"{folder} holds the tokens of another text, or in shards of another size; choose "
        "another folder, or delete it"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, which ends with the process however that ends."""
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that tokenises into {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


@dataclass
class _Done:
    """progress.json: the shards that are written, and where the next one begins."""

    key: str
    shard_tokens: int
    highest: int = -1
    file: int = 0  # and start: the piece that the next shard's first token is of
    start: int = 0
    skip: int = 0  # tokens of that piece that are written
    shards: tuple[Shard, ...] = ()


def _fill(folder: Path, text: Text, workers: int, shard_tokens: int, lock: int) -> None:
    dtype = "uint16" if gpt2().n_vocab <= 1 << 16 else "uint32"
    done = _resume(folder, _Done(text.key, shard_tokens), np.dtype(DTYPES[dtype]).itemsize)
    pieces = documents.pieces(text.files, text.text_field, done.file, done.start)
    with _progress(text) as advance, closing(_encoded(text, pieces, workers, lock, advance)) as ids:
        advance(sum(size for size, _ in text.stamps[: done.file]) + done.start)
        stream = _Stream(ids, done.skip)
        while stream.more():
            path = folder / _shard_name(len(done.shards))
            shard, highest = _write_shard(path, stream, shard_tokens, DTYPES[dtype])
            done.shards, done.highest = (*done.shards, shard), max(done.highest, highest)
            done.file, done.start, done.skip = *stream.place, stream.used
            write_text(folder / PROGRESS_FILE, json.dumps(asdict(done)))
    try:
        documents.require_unchanged(text)
    except InputError:
        (folder / PROGRESS_FILE).unlink()  # these tokens are of neither text
        raise
    total = sum(shard.tokens for shard in done.shards)
    index = Index(dtype, RANKS_SHA256, text.key, shard_tokens, total, done.highest, done.shards)
    record = {"format": FORMAT, "version": VERSION, **asdict(index)}
    write_text(folder / INDEX_FILE, json.dumps(record, indent=1) + "\n")


def _resume(folder: Path, fresh: _Done, width: int) -> _Done:
    path = folder / PROGRESS_FILE
    if not path.is_file():
        if (folder / _shard_name(0)).exists():
            raise InputError(
                f"{folder} holds shards without an index; delete it, or choose another"
            )
        write_text(path, json.dumps(asdict(fresh)))
        return fresh
    try:
        found = read_json(path)
        done = _Done(**found | {"shards": tuple(Shard(**shard) for shard in found["shards"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete {folder}") from None
    if (done.key, done.shard_tokens) != (fresh.key, fresh.shard_tokens):
        raise _another_text(folder)
    for shard in done.shards:
        _require_size(folder, shard, width)
    return done


def _write_shard(path: Path, stream: "_Stream", n: int, dtype: str) -> tuple[Shard, int]:
    """Write the next ``n`` ids, or all that are left; return the shard and its highest id."""
    digest, highest, tokens = hashlib.sha256(), -1, 0

    def write(temporary: Path) -> None:
        nonlocal highest, tokens
        with temporary.open("wb") as file:
            for part in stream.take(n):
                data = part.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                highest, tokens = max(highest, int(part.max())), tokens + len(part)

    atomic_write(path, write)
    return Shard(path.name, tokens, digest.hexdigest()), highest


class _Stream:
    """Pieces' ids as one sequence that knows which piece it is in."""

    def __init__(self, encoded: Iterator[tuple[Piece, Ids]], skip: int) -> None:
        self.encoded, self.skip = encoded, skip
        self.rest: Ids = np.zeros(0, np.uint32)
        self.place, self.used = (0, 0), 0

    def more(self) -> bool:
        """Return whether ids are left."""
        while not len(self.rest):
            found = next(self.encoded, None)
            if found is None:
                return False
            piece, ids = found
            self.place, self.used, self.skip = (piece.file, piece.start), self.skip, 0
            self.rest = ids[self.used :]
        return True

    def take(self, n: int) -> Iterator[Ids]:
        """Yield the next ``n`` ids, or all that are left, in parts."""
        while n and self.more():
            part, self.rest = self.rest[:n], self.rest[n:]
            self.used += len(part)
            n -= len(part)
            yield part


def _encoded(
    text: Text, pieces: Iterator[Piece], workers: int, lock: int, advance: Any
) -> Generator[tuple[Piece, Ids], None, None]:
    """Yield every piece with its ids, in order; only a few pieces are ever in memory."""
    n_pieces = 1 + sum(size for size, _ in text.stamps) // documents.PIECE
    workers = min(workers or len(os.sched_getaffinity(0)), n_pieces)
    if workers == 1:
        for piece in pieces:
            yield piece, documents.encode(piece, text.text_field)
            advance(piece.n_bytes)
        return
    gpt2()  # before the workers part from this process, so that they share it
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_begin_worker, initargs=(os.getpid(), lock)
    )
    waiting: deque[tuple[Piece, Future[Ids]]] = deque()

    def first() -> tuple[Piece, Ids]:
        piece, future = waiting.popleft()
        ids = future.result()
        advance(piece.n_bytes)
        return piece._replace(content=()), ids

    try:
        with warnings.catch_warnings():
            # Python warns of forking beside threads; the workers use none of what these hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(int)
        for piece in pieces:
            waiting.append((piece, pool.submit(documents.encode, piece, text.text_field)))
            if len(waiting) > 2 * workers:
                yield first()
        while waiting:
            yield first()
    except BrokenProcessPool:
        raise InputError(
            "a process that tokenises was killed (out of memory?); what is done is kept: run "
            "this again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int, lock: int) -> None:
    """Leave signals and the lock to the parent, and end when it does, even by SIGKILL."""
    os.close(lock)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _progress(text: Text) -> Iterator[Any]:
    """Show a bar on a terminal; yield what is to be told how many bytes are done."""
    console = Console(stderr=True)
    with rich_progress.Progress(
        rich_progress.TextColumn("tokenising"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=sum(size for size, _ in text.stamps))
        yield partial(bar.advance, task)
