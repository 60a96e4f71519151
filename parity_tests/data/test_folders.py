"""The files that a folder or a glob stands for, held to a definition of their own."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.notes import note
from llama_torch.data.text_files import find_files, identify

from ..support.token_shards import refused

NAMES = ("a", "b", "B", "a b", "a-b", ".h", "x[1]")
# Endings of text files, in cases that people and systems write, and of others.
TEXT = (".txt", ".md", ".jsonl", ".parquet", ".TXT", ".txt.gz", ".JSONL.Zst", ".md.zst", ".MD.GZ")
OTHER = ("", ".py", ".gz", ".parquet.gz", ".txt.bz2", ".txt.gz.zst")

names = st.sampled_from(NAMES)
files = st.tuples(names, st.sampled_from(TEXT + OTHER)).map("".join)
folders = st.lists(names, max_size=3).map("/".join)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, str | None]]:
    """Draw the names below a folder, each with what it links to: None = a file of its own."""
    found: list[tuple[str, str | None]] = []
    for folder, file in draw(st.lists(st.tuples(folders, files), max_size=8), label="files"):
        found.append((f"{folder}/{file}".lstrip("/"), None))
    copy = st.tuples(
        st.sampled_from([name for name, _ in found] or ["a.txt"]),
        st.sampled_from([".gz", ".zst", ".GZ"]),
    )
    found += [("".join(c), None) for c in draw(st.lists(copy, max_size=3), label="copies")]
    link = st.tuples(folders, names | files)
    target = folders | st.sampled_from([name for name, _ in found] or [""]) | st.just("none")
    for (folder, name), to in draw(st.lists(st.tuples(link, target), max_size=4), label="links"):
        found.append((f"{folder}/{name}".lstrip("/"), to))
    return found


def make(root: Path, tree: list[tuple[str, str | None]]) -> None:
    for name, to in tree:
        path = root / name
        with suppress(OSError):  # the name is another's already
            path.parent.mkdir(parents=True, exist_ok=True)
            if to is None:
                path.write_text(name)
            else:
                path.symlink_to(root / to)


def is_text(name: str) -> bool:
    stem, _, end = name.lower().rpartition(".")
    if end in ("gz", "zst"):
        stem, _, end = stem.rpartition(".")
        return bool(stem) and end in ("txt", "md", "jsonl")
    return bool(stem) and end in ("txt", "md", "jsonl", "parquet")


def every_path(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield every file by every path that enters no folder twice, hidden names left out."""
    if folder.resolve() in above:
        return
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from every_path(path, (*above, folder.resolve()))
        elif path.is_file():
            yield path


def expected(folder: Path, matches: Callable[[Path], object] = lambda _: True) -> list[Path]:
    """Return the first path of every real file, compared name by name."""
    first: dict[Path, Path] = {}
    found = sorted((p for p in every_path(folder) if is_text(p.name)), key=lambda p: p.parts)
    for path in without_copies([p for p in found if matches(p.relative_to(folder))]):
        first.setdefault(path.resolve(), path)
    return list(first.values())


def without_copies(paths: list[Path]) -> list[Path]:
    """Return the paths without those that another one is, but for the compression's ending."""
    kept: dict[str, Path] = {}
    for end in (None, ".gz", ".zst"):
        for path in paths:
            name = str(path)
            is_compressed = name.lower().endswith((".gz", ".zst"))
            if name.lower().endswith(end) if end else not is_compressed:
                kept.setdefault(name[: -len(end)] if end else name, path)
    return [path for path in paths if path in kept.values()]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return the function that empties one folder for each example."""
    root = tmp_path_factory.mktemp("trees")

    def empty() -> Path:
        shutil.rmtree(root / "texts", ignore_errors=True)
        (root / "texts").mkdir()
        return root / "texts"

    return empty


@given(tree=trees())
def test_folder_and_glob_take_the_files_of_the_definition(
    room: Callable[[], Path], tree: list[tuple[str, str | None]]
) -> None:
    folder = room()
    make(folder, tree)
    wanted = expected(folder)
    for pattern in (folder, folder / "**", folder / "**/*"):
        if wanted:
            assert find_files([str(pattern)]) == wanted, pattern
        else:
            refused(lambda pattern=pattern: find_files([str(pattern)]))


@given(tree=trees())
def test_a_glob_takes_those_that_it_matches(
    room: Callable[[], Path], tree: list[tuple[str, str | None]]
) -> None:
    """Without links, where a file has one path."""
    folder = room()
    make(folder, [(name, to) for name, to in tree if to is None])
    for pattern, matches in (
        ("*", lambda p: len(p.parts) == 1),
        ("*.txt", lambda p: len(p.parts) == 1 and p.suffix == ".txt"),
        ("a*/**/*.[tm]*", lambda p: len(p.parts) > 1 and re.match(r"a.*/.*\.[tm]", str(p))),
        ("**/a/*", lambda p: p.parts[-2:-1] == ("a",)),
        ("**/?.md/**", lambda p: False),
        ("*/", lambda p: len(p.parts) > 1),
    ):
        wanted = expected(folder, matches)
        if wanted:
            assert find_files([f"{folder}/{pattern}"]) == wanted, pattern
        else:
            refused(lambda pattern=pattern: find_files([f"{folder}/{pattern}"]))


def test_links_in_circles_end(tmp_path: Path) -> None:
    """Two links to the folder itself: a walk that follows them 40 times has 2**40 paths."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.txt").write_text("text")
    for name in ("a", "c", "b/d"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert find_files([str(tmp_path)]) == [tmp_path / "b/x.txt"]
    assert find_files([str(tmp_path / "*/**/x.*")]) == [tmp_path / "a/b/x.txt"]


def test_a_deep_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python's recursion goes."""
    monkeypatch.chdir(tmp_path)
    depth = 0
    try:
        while depth < 1200:
            os.mkdir("a")
            os.chdir("a")
            depth += 1
        Path("x.txt").write_text("text")
        os.chdir(tmp_path)
        (found,) = find_files(["."])
        assert len(found.parts) == 1201
    finally:
        # What removes pytest's folders recurses.
        os.chdir(tmp_path)
        for _ in range(depth):
            os.chdir("a")
        Path("x.txt").unlink(missing_ok=True)
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("a")


def test_hidden_names_are_read_where_they_are_named(tmp_path: Path) -> None:
    for name in (".data/a.txt", ".data/.b.txt", ".c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert find_files([str(tmp_path / ".data")]) == [tmp_path / ".data/a.txt"]
    assert find_files([str(tmp_path / ".c.txt")]) == [tmp_path / ".c.txt"]
    assert find_files([str(tmp_path / ".*/*")]) == [tmp_path / ".data/a.txt"]
    assert find_files([str(tmp_path / ".*.txt")]) == [tmp_path / ".c.txt"]
    assert "no file found (passed over: 2 hidden)" in refused(lambda: find_files([str(tmp_path)]))


def test_one_line_counts_what_is_read_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    names = ["a.txt", "B.TXT", "c.jsonl.gz", "d.py", "sub/e.py", "f.csv", "README", ".g.txt"]
    for name in (*names, ".venv/h.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    (folder / "gone.txt").symlink_to("nowhere")
    counts = ["2 .py", "1 .csv", "1 without an ending", "1 broken link", "2 hidden"]

    def said(*data: str) -> str:
        note.cache_clear()
        find_files(data)
        return capsys.readouterr().err

    for pattern in (str(folder), f"{folder}/**"):
        line = said(pattern)
        assert line.startswith(f"note: --data {pattern}: 3 files; passed over: 2 .py, 1 ")
        kinds = sorted(line.strip().partition("over: ")[2].split(", "))
        assert kinds == sorted(counts)
    assert "2 files; passed over: " in said(f"{folder}/*.[tT]*")
    assert ", 1 folder" in said(f"{folder}/*")
    assert said(str(folder / "a.txt")) == ""
    assert "--data 2 folders and globs: 3 files;" in said(str(folder), f"{folder}/*.txt")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert said(str(folder)) == ""


def test_a_text_and_its_compressed_copies_are_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told by name, in one folder; what the glob leaves out or a name says is read."""
    names = ["a.txt", "a.txt.gz", "a.TXT.gz", "b.md.GZ", "b.md.zst", "sub/a.txt.gz", "a.md.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")

    def found(*patterns: str) -> list[str]:
        note.cache_clear()
        capsys.readouterr()
        given = [f"{tmp_path}/{pattern}" for pattern in patterns]
        return [str(path.relative_to(tmp_path)) for path in find_files(given)]

    kept = ["a.TXT.gz", "a.md.gz", "a.txt", "b.md.GZ", "sub/a.txt.gz"]
    assert found("") == kept
    assert capsys.readouterr().err.endswith(": 5 files; passed over: 2 compressed copies\n")
    assert found("a.txt*") == ["a.txt"]
    assert capsys.readouterr().err.endswith(": 1 file; passed over: 1 compressed copy\n")
    assert found("*.gz") == ["a.TXT.gz", "a.md.gz", "a.txt.gz"]
    assert found("a.txt", "a.txt.gz") == ["a.txt", "a.txt.gz"]
    key = identify(find_files([f"{tmp_path}/a.txt*"]), "text").key
    (tmp_path / "a.txt.zst").write_text("written beside it by zstd")
    assert identify(find_files([f"{tmp_path}/a.txt*"]), "text").key == key


def test_a_file_that_joins_or_changes_is_another_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    keys = [identify(find_files([str(tmp_path)]), "text").key]
    for name, content in (("b.TXT", "two"), ("b.TXT", "three"), (".c.txt", "hidden")):
        (tmp_path / name).write_text(content)
        keys.append(identify(find_files([str(tmp_path)]), "text").key)
    assert len(set(keys[:3])) == 3
    assert keys[3] == keys[2]
