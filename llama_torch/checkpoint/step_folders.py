"""Checkpoint folders of a run, ``checkpoints/STEP``: each is complete or absent.

A folder is written as ``STEP.tmp``, flushed to disk, then renamed to ``STEP``.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_common.errors import InputError, is_digits
from llama_common.files import flush, publish_folder, remove

from ..common.state_file import MOST
from .file_names import MODEL_FILE

FOLDER = "checkpoints"
BEST = "best"  # folder of the model with the lowest validation loss
TEMPORARY = ".tmp"


def commit(out: Path, step: int, write: Callable[[Path], None], keep_last: int = 2) -> Path:
    """Write the checkpoint of ``step`` with ``write``, then keep the newest ``keep_last`` alone.

    ``write`` receives the temporary folder. Returns ``out``/checkpoints/``step``. Only the process
    that holds the run's lock calls this. Raises InputError where the disk refuses the files.
    """
    folder = make_folder(final_folder(out, step), write)
    prune(out, keep_last)
    return folder


def final_folder(out: Path, step: int) -> Path:
    """Return the path of a step's checkpoint folder, ``out``/checkpoints/``step``."""
    return out / FOLDER / str(step)


def prune(out: Path, keep_last: int) -> None:
    """Delete all checkpoints but the newest ``keep_last``."""
    for old in steps(out)[:-keep_last]:
        _remove(out / FOLDER / str(old))


def newest(out: Path, before: int | None = None) -> Path | None:
    """Return the newest checkpoint's folder, or the newest before a step; None if there is none."""
    found = [step for step in steps(out) if before is None or step < before]
    return out / FOLDER / str(found[-1]) if found else None


def make_folder(final: Path, write: Callable[[Path], None]) -> Path:
    """Write a temporary folder with ``write``, flush it to disk, then rename it to ``final``.

    A kill at any moment leaves ``final`` complete or absent, and at worst a ``.tmp`` folder, which
    ``remove_temporary`` removes. A ``final`` that exists is kept unchanged. Raises InputError
    where the disk refuses the files.
    """
    if final.is_dir():
        return final
    try:
        with disk_errors(final):
            write(create_temporary(final))
            publish(final)
    finally:
        shutil.rmtree(temporary_path(final), ignore_errors=True)
    return final


@contextmanager
def disk_errors(final: Path) -> Iterator[None]:
    """Raise InputError for an OSError met while ``final`` is written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{final}: cannot be written ({error}); the last checkpoint stands"
        ) from None


def create_temporary(final: Path) -> Path:
    """Create the empty temporary folder of ``final``, and return its path."""
    temporary = temporary_path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def publish(final: Path) -> None:
    """Flush the temporary folder of ``final`` to disk, and rename it to ``final``."""
    publish_folder(temporary_path(final), final)
    flush(final.parent.parent)


def temporary_path(final: Path) -> Path:
    """Return the path that a folder is written to before it is renamed to ``final``.

    Processes that write one checkpoint together derive it from the step alone.
    """
    return final.with_name(final.name + TEMPORARY)


def remove_temporary(out: Path) -> None:
    """Remove the temporary files and folders of a killed run; the caller holds the run's lock."""
    names = f"{FOLDER}/*", f"{BEST}", f"{MODEL_FILE}.*", f"{BEST}/{MODEL_FILE}.*"
    for path in (path for name in names for path in out.glob(name + TEMPORARY)):
        remove(path)


def steps(out: Path) -> list[int]:
    """Return the steps that have a checkpoint, in ascending order."""
    return sorted(int(path.name) for path in (out / FOLDER).glob("*") if _is_step(path))


def _is_step(path: Path) -> bool:
    """Return whether a path is a folder named by a step as ``final_folder`` names it."""
    name = path.name
    is_number = is_digits(name) and name == str(int(name)) and int(name) <= MOST
    return is_number and path.is_dir()


def _remove(folder: Path) -> None:
    """Rename a checkpoint, then delete it: a partly deleted folder must not look complete."""
    renamed = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)
