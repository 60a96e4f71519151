"""Files that are written whole: through failures, kills, and what those leave behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_common.errors import InputError
from llama_common.files import atomic_write, new_folder, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import os, signal, pathlib, sys\n"
        "from llama_common.files import atomic_write\n"
        "def die(temporary):\n"
        "    temporary.write_text('half')\n"
        "    temporary.with_name('.tmp' + 'a1b2c3').write_text('a quarter')  # as libraries do\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(pathlib.Path(sys.argv[1]), die)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "old"
    atomic_write(path, lambda temporary: temporary.write_text("new") and None)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_folder_is_filled_where_a_killed_process_left_one(tmp_path: Path) -> None:
    for pid in (os.getpid(), 999999999):
        (tmp_path / f"out[1].{pid}.tmp" / "below").mkdir(parents=True)
    with new_folder(tmp_path / "out[1]" / "below") as folder:
        (folder / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]
    assert (tmp_path / "out[1]" / "below" / "file").read_text() == "whole"


def test_what_only_looks_like_a_left_over_is_kept(tmp_path: Path) -> None:
    names = ["file.old.tmp", "file.1.2.tmp", "file.v9-.tmp", "other.999999999.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    write_text(tmp_path / "file", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"file", *names}


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("name", ["file.{}.tmp", "file.0-{}.tmp"])
def test_what_a_killed_process_of_the_same_number_left_is_removed(
    tmp_path: Path, name: str, is_folder: bool
) -> None:
    """In a container every start may have the number 1; earlier versions left plain files."""
    left_over = tmp_path / name.format(os.getpid())
    if is_folder:
        left_over.mkdir()
        (left_over / "file").write_text("half")
    else:
        left_over.write_text("half")
    write_text(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_another_live_process_keeps_what_it_fills(tmp_path: Path) -> None:
    theirs = tmp_path / f"file.0-{os.getppid()}.tmp"
    theirs.mkdir()
    write_text(tmp_path / "file", "whole")
    assert theirs.is_dir()


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    texts = [str(i) * 1000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "file", text), texts * 4))
    assert (tmp_path / "file").read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_permissions_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "file", "whole")
        os.umask(0o022)
        (tmp_path / "file.1.tmp").mkdir()
        atomic_write(tmp_path / "file", lambda path: os.close(os.open(path, os.O_CREAT, 0o600)))
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_text() == ""


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no file; give the name of one"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
