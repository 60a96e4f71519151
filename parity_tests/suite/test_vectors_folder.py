"""A folder of golden vectors is listed, copied whole or not at all, and refused if it is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reference_np.config import InputError

from ..vectors import folder as vectors_folder
from ..vectors.check import check
from ..vectors.folder import INDEX, VECTORS, copy_vectors, list_cases, load_index
from .vector_traces import CASES, write_basic


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of the vectors."""
    copy_vectors(tmp_path / "source")
    return tmp_path / "source"


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by their place."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_copy_and_a_list_are_complete(source: Path) -> None:
    ours = {name for name in files(VECTORS) if "." in name and not name.endswith((".py", ".pyc"))}
    ours = {name for name in ours if "__pycache__" not in name} - {"page.md"}
    copied = files(source)
    assert {name for name in copied if not name.endswith(".py")} == ours
    assert {name for name in copied if name.endswith(".py")} == {
        path.relative_to(VECTORS).as_posix() for path in VECTORS.glob("readers/*.py")
    }
    assert all(copied[name] == (VECTORS / name).read_bytes() for name in copied)
    assert [line.split()[0] for line in list_cases(source)] == list(CASES)


def test_a_new_folder_is_made_with_those_above_it_and_an_empty_one_is_filled(
    source: Path, tmp_path: Path
) -> None:
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    number = empty.stat().st_ino
    link.symlink_to(empty)
    for target in (tmp_path / "some" / "new", link):
        assert copy_vectors(target, source) == len(CASES)
        assert files(target) == files(source)
    # A shell that stands in it still does.
    assert empty.stat().st_ino == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "some", "source"]


def test_the_current_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    copy_vectors(Path())
    assert Path(INDEX).is_file()
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize("place", ["", "copy", "models/copy", "traces/a/b"])
def test_a_copy_into_the_vectors_own_folder_is_refused(
    place: str, source: Path, tmp_path: Path
) -> None:
    before = files(source)
    (tmp_path / "link").symlink_to(source)
    for target in (source / place, tmp_path / "link" / place, source / "models" / ".." / place):
        with pytest.raises(InputError, match="is there already|inside the vectors' own folder"):
            copy_vectors(target, source)
    assert files(source) == before
    (source / "empty").mkdir()
    with pytest.raises(InputError, match="is inside the vectors' own folder; give one outside"):
        copy_vectors(source / "empty", source)


def test_a_folder_with_something_in_it_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "full"
    target.mkdir()
    (target / "mine").write_text("kept")
    for path in (target, target / "mine"):
        with pytest.raises(InputError, match="is there already; give a new or empty folder"):
            copy_vectors(path, source)
    assert files(target) == {"mine": b"kept"}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("fails", ["copyfile", "move"])
def test_a_copy_that_fails_leaves_nothing(
    exists: bool, fails: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(shutil, fails), 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(vectors_folder.shutil, fails, full)
    target = tmp_path / "over" / "there"
    if exists:
        target.mkdir(parents=True)
    if fails == "move" and not exists:
        assert copy_vectors(target, source) == len(CASES)  # one rename
        return
    with pytest.raises(InputError, match="there: cannot be written .No space left on device"):
        copy_vectors(target, source)
    if exists:
        assert [*(tmp_path / "over").rglob("*")] == [target]
    else:
        assert not (tmp_path / "over").exists()


def test_vectors_of_another_schema_version_are_refused(source: Path, tmp_path: Path) -> None:
    traces = write_basic(tmp_path / "traces")
    assert check(traces, folder=source) == check(traces)
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    (source / INDEX).write_text(json.dumps(index | {"schema_version": 2}), encoding="utf-8")
    with pytest.raises(InputError, match="its schema version is 2, and this release reads 1"):
        check(traces, folder=source)
    (source / INDEX).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is no index of golden vectors"):
        load_index(source)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cases": []}, r"breaks vectors.schema.json \(index.cases: has 0 items"),
        ({"cases": [{"id": "x"}]}, r"\(index.cases\[0\]: lacks about"),
        ({"precisions": ["float8"] * 4}, "'float8' is none of"),
        ({"models": 3}, "index.models: 3 is no object"),
    ],
)
def test_an_index_that_breaks_its_schema_is_refused(change: Any, words: str, source: Path) -> None:
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    (source / INDEX).write_text(json.dumps(index | change), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        load_index(source)


def test_vectors_without_their_traces_are_refused(source: Path, tmp_path: Path) -> None:
    traces = write_basic(tmp_path / "traces")
    shutil.rmtree(source / "traces")
    with pytest.raises(InputError, match="no such file"):
        check(traces, folder=source)


def test_folders_without_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        check(tmp_path / "none")
    with pytest.raises(InputError, match="has no trace of a case, as basic-one-token.safetensors"):
        check(tmp_path)


def test_a_copy_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import os, shutil, signal, sys; from llama_parity.command import main;"
        "real = shutil.copyfile; seen = [];\n"
        "def copyfile(*a):\n"
        "    seen.append(a); len(seen) == 9 and os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*a)\n"
        "shutil.copyfile = copyfile; sys.exit(main.main(['vectors', 'copy', 'new']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 143, done.stderr
    assert os.listdir(tmp_path) == []
