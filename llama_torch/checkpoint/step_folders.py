"""The checkpoints of a run: folders named by their step, each of them complete or absent."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import InputError
from ..common.files import flush
from .hf import MODEL_FILE

FOLDER = "checkpoints"
BEST = "best"  # the model of the lowest validation loss
TEMPORARY = ".tmp"


def commit(out: Path, step: int, write: Callable[[Path], None], keep_last: int = 2) -> Path:
    """Let ``write`` fill the checkpoint of ``step``, then drop all but the newest ``keep_last``.

    Returns its folder, ``out``/checkpoints/``step``. What it is filled as is ``temporary`` of
    that path: processes that fill one checkpoint together know the name without asking. Only
    one process commits, and it holds the run's lock.
    """
    folder = make_folder(final_folder(out, step), write)
    prune(out, keep_last)
    return folder


def final_folder(out: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return out / FOLDER / str(step)


def prune(out: Path, keep_last: int) -> None:
    """Drop all checkpoints but the newest ``keep_last``."""
    for old in steps(out)[:-keep_last]:
        _remove(out / FOLDER / str(old))


def newest(out: Path, before: int | None = None) -> Path | None:
    """Return the newest checkpoint's folder, of those before a step if one is given."""
    found = [step for step in steps(out) if before is None or step < before]
    return out / FOLDER / str(found[-1]) if found else None


def make_folder(final: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary folder, flush it to disk, then rename it to ``final``.

    A kill at any moment leaves no ``final`` or a whole one, and at worst a ``.tmp`` beside it,
    which ``sweep`` removes. One that is there stays. Raises InputError for what cannot be
    written.
    """
    if final.is_dir():
        return final
    try:
        with writing(final):
            filling = begin(final)
            write(filling)
            finish(final)
    finally:
        shutil.rmtree(temporary(final), ignore_errors=True)
    return final


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Turn what the disk refuses while ``final`` is written into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{final}: cannot be written ({error}); the last checkpoint stands"
        ) from None


def begin(final: Path) -> Path:
    """Make the empty folder that is to be filled, and return it."""
    filling = temporary(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir()
    return filling


def finish(final: Path) -> None:
    """Flush what was filled to disk, and give it its name."""
    filling = temporary(final)
    for path in (*filling.rglob("*"), filling):
        flush(path)
    filling.rename(final)
    flush(final.parent)
    flush(final.parent.parent)


def temporary(final: Path) -> Path:
    """Return where a folder is filled before it has its name."""
    return final.with_name(final.name + TEMPORARY)


def sweep(out: Path) -> None:
    """Remove what a killed run was writing. Only with the run's lock in hand."""
    names = f"{FOLDER}/*", f"{BEST}", f"{MODEL_FILE}.*", f"{BEST}/{MODEL_FILE}.*"
    for path in (path for name in names for path in out.glob(name + TEMPORARY)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def steps(out: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    return sorted(int(path.name) for path in (out / FOLDER).glob("*") if path.name.isdigit())


def _remove(folder: Path) -> None:
    """Take a folder's name away before its files: half a checkpoint has no name."""
    doomed = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
