"""Folders of valid files, built when they are first asked for, and one file of them changed."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .folders import BUILD, model
from .kinds import Kind

Change = Callable[[Kind, bytes], contextlib.AbstractContextManager[Path]]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a builder's name to its folder, beside one that is not to be read."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "outside").mkdir()
    model(root / "outside")

    def build(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            BUILD[name](folder)
        return folder

    return build


@pytest.fixture(scope="session")
def changed(built: Callable[[str], Path]) -> Change:
    """Return a context in which a kind's file has other content; what it leaves is undone."""

    @contextlib.contextmanager
    def change(kind: Kind, content: bytes) -> Iterator[Path]:
        folder = built(kind.folder)
        kept, path = folder.with_name(f"{folder.name}.kept"), folder / kind.file
        folder.rename(kept)
        try:
            shutil.copytree(kept, folder)
            path.unlink()  # a tensor of an earlier example may be mapped
            path.write_bytes(content)
            yield folder
        finally:
            shutil.rmtree(folder)
            kept.rename(folder)

    return change
