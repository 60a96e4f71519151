"""Read JSON, and write files so that a kill leaves the old one or the new one."""

import contextlib
import fcntl
import glob
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

LFS = b"version https://git-lfs"  # how a pointer begins
_NUMBERS = itertools.count()
_FILLING: set[Path] = set()  # folders that this process writes to now
_TEMPORARY = re.compile(r"\.(?:\d+-)?(\d+)\.tmp", re.ASCII)  # after a path's name; of the process


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, then rename it to ``path``.

    The file stands in a temporary folder, since the writer of safetensors makes another one
    beside it, which a kill would leave. A kill at any moment leaves the old file or the new one.
    Raises InputError for a device or a pipe, which the rename would replace.
    """
    require_file_or_nothing(path, str(path))
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        write(temporary)
        finish(temporary)
        temporary.replace(path)
    flush(path.parent)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, removed at the end unless it was renamed.

    A kill leaves it, until the next one for the same path is made. Its name carries the process,
    so that two processes that fill one cache do not meet in it.
    """
    for left_over in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        named = _TEMPORARY.fullmatch(left_over.name.removeprefix(path.name))
        # In a container every start may have the number of the one that was killed.
        is_own = named and int(named[1]) == os.getpid()
        if named and (left_over not in _FILLING if is_own else not _alive(int(named[1]))):
            remove(left_over)
    folder = path.with_name(f"{path.name}.{next(_NUMBERS)}-{os.getpid()}.tmp")
    _FILLING.add(folder)
    try:
        folder.mkdir()
        yield folder
    finally:
        remove(folder)
        _FILLING.discard(folder)


def remove(left_over: Path) -> None:
    """Remove a temporary file or folder; of a link the link alone."""
    if left_over.is_dir() and not left_over.is_symlink():
        shutil.rmtree(left_over, ignore_errors=True)
    else:
        left_over.unlink(missing_ok=True)  # as earlier versions left them


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def finish(path: Path) -> None:
    """Flush a file in a folder of ours to disk, with the permissions that the user's mask gives.

    Libraries make files for the owner alone. Some file systems have no permissions to change.
    """
    mode = path.parent.stat().st_mode & 0o666
    if path.stat().st_mode & 0o777 != mode:
        with contextlib.suppress(OSError):
            path.chmod(mode)
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush a temporary folder and all that is in it to disk, then rename it to ``final``.

    A kill at any moment leaves ``final`` absent or complete. An empty folder of that name is
    replaced; raises OSError for one that is not empty.
    """
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    temporary.rename(final)
    flush(final.parent)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``final``, a new or an empty one, in one rename.

    On any failure nothing of it is left, nor of the missing folders above ``final``.
    """
    top = final = Path(os.path.realpath(final))
    while not top.parent.is_dir():
        top = top.parent
    with temporary_folder(top) as temporary:
        inner = temporary / final.relative_to(top)
        inner.mkdir(parents=True, exist_ok=True)
        yield inner
        publish_folder(temporary, top)


def open_lock(path: Path) -> int:
    """Open a lock file, made if need be, and return its descriptor; its content is left alone.

    Raises OSError for a link: what it points to is no file of ours.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def try_lock(handle: int) -> bool:
    """Lock an open file, without waiting; return whether no other open file of it holds the lock.

    The lock is released when the last copy of the descriptor is closed, and so when the process
    ends, however it ends. Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; unlike ``write_text`` not atomically, for folders that become so."""
    _write_text(path, json.dumps(value, indent=2) + "\n")


def require_name(path: Path) -> None:
    """Raise InputError for a path that no file can have: too long, or with a zero byte in it.

    Asked whether such a file is there, Python raises errors of several kinds.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise InputError(f"{path}: is not the path of a file ({reason}); correct it") from None


def require_file_or_nothing(path: Path, who: str) -> None:
    """Raise InputError, whose first word is ``who``, for a folder, a device or a pipe."""
    if path.exists() and not path.is_file():
        raise InputError(f"{who}: is no file; give the name of one")


def require_writable_below(out: Path) -> None:
    """Raise InputError for a new folder of ``--out`` that cannot be made; told before long work."""
    nearest = out
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} cannot be written below {nearest}; choose another directory")


def require_writable(path: Path, who: str) -> None:
    """Raise InputError, whose first words are ``who``, where a file cannot be written atomically.

    Told before long work. A folder of a temporary name is made beside it, and removed.
    """
    require_file_or_nothing(path, who)
    if not path.parent.is_dir():
        raise InputError(f"{who}: there is no directory {path.parent}; make it first")
    try:
        with temporary_folder(path):
            pass
    except OSError as error:
        raise InputError(
            f"{who}: cannot be written there ({error.strerror}); name another place"
        ) from None


def require_readable(path: Path) -> None:
    """Raise InputError for a file that is there and cannot be opened.

    The reader of safetensors says of it that it is not there.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give yourself the right to read it"
        ) from None


def require_no_pointer(path: Path) -> None:
    """Raise InputError for a file whose content git-LFS has not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise InputError(f"{path}: is a git-LFS pointer and not the file; run git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError names the file."""
    text = read_json_text(path)
    try:
        return parse_json(text, str(path))
    except InputError:
        require_no_pointer(path)
        raise


def read_json_text(path: Path) -> str:
    """Return a JSON file's text; InputError names a file that cannot be read or is no text.

    A pipe or a device is not waited for.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("no regular file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # bytes that are no text, a name that none can have
        raise InputError(f"{path}: cannot be read ({error}); write it again") from None


def parse_json(
    text: str, source: str, remedy: str = "write it again", **hooks: Any
) -> dict[str, Any]:
    """Parse a JSON object; InputError names its source and the remedy.

    ``hooks`` are those of json.loads, whose ValueError says what is wrong.
    """
    try:
        value = json.loads(text, **hooks)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: is not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: is not a JSON object; {remedy}")
    return value
