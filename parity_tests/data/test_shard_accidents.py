"""Preparing token shards: the same bytes after a kill, a full disk or a text that changes."""

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_common import files
from llama_common.notes import note
from llama_torch.data import documents, shard_writer
from llama_torch.data.shard_writer import prepare
from llama_torch.data.shards import TokenShards
from llama_torch.data.text_files import Text, find_files, identify

from ..support import state_files
from ..support.token_shards import LINES, content_of, killed_at, refused, stopped_at


def test_a_killed_preparation_goes_on_to_the_same_bytes(text: Text, tmp_path: Path) -> None:
    """Before and after every rename of every file; and again and again in one folder."""
    prepare(text, tmp_path / "whole", 1, 1000)
    whole, ends = content_of(tmp_path / "whole"), []
    # The first progress.json, two files a shard, and the index; each before and after a rename.
    moments = 2 * (1 + 2 * len(list((tmp_path / "whole").glob("*.bin"))) + 1)
    while 0 not in ends:
        folder = tmp_path / f"killed {len(ends)}"
        ends.append(killed_at(len(ends), text, folder, 1))
        assert (folder / "index.json").exists() == (len(ends) >= moments)
        prepare(text, folder, 1, 1000)
        assert content_of(folder) == whole
    assert ends == [-signal.SIGKILL] * moments + [0]
    folder, again = tmp_path / "again", 0
    while killed_at(5, text, folder, 2):
        again += 1
    assert content_of(folder) == whole
    assert again >= 2


def test_what_is_done_is_not_done_again(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, real = [], documents.encode
    monkeypatch.setattr(
        documents, "encode", lambda p, *given: done.append(p[1:3]) or real(p, *given)
    )
    prepare(text, tmp_path / "whole", 1, 1000)
    whole = done.copy()
    assert len(whole) > 12
    assert killed_at(9, text, tmp_path / "killed", 1) == -signal.SIGKILL
    n_tokens = 1000 * len(list((tmp_path / "killed").glob("*.bin")))
    assert n_tokens == 2000
    done.clear()
    prepare(text, tmp_path / "killed", 1, 1000)
    assert done == whole[len(whole) - len(done) :]
    assert len(done) < len(whole) - 5


@pytest.mark.parametrize("old", [False, True], ids=["", "as an earlier version wrote them"])
def test_nulls_are_counted_once_whatever_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old: bool
) -> None:
    """A shard ends within pieces, before nulls, between them, and where a piece ends."""
    monkeypatch.setattr(documents, "PIECE", 200)
    (tmp_path / "a.txt").write_text("No record.")
    rows = [*LINES[:2], None, *LINES[2:9], None, None, *[None] * 40, *LINES[9:12], None]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    text = identify(sorted(tmp_path.glob("?.*")), "text")
    whole = prepare(text, tmp_path / "whole", 1, 31)
    assert (whole.index.nulls, whole.index.first_null_file) == (rows.count(None), 1)
    assert len(whole.index.shards) > 4
    said = f"{rows.count(None)} records left out whose text is null, first in {text.files[1]}\n"
    assert said in capsys.readouterr().err
    for shard in whole.index.shards:
        folder = tmp_path / f"stopped {shard.name}"
        stopped_at(shard.name, text, folder, 31)
        assert capsys.readouterr().err == ""
        if old:
            path = folder / "progress.json"
            stored = state_files.read(path)
            del stored["nulls"], stored["first_null_file"]
            path.write_text(json.dumps(stored))
        note.cache_clear()
        found = prepare(text, folder, 2, 31)
        printed = capsys.readouterr().err
        assert old or (said in printed and found.index == whole.index)
    index = state_files.read(tmp_path / "whole" / "index.json")
    del index["nulls"], index["first_null_file"]
    (tmp_path / "whole" / "index.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert prepare(text, tmp_path / "whole", 1, 31)[:].tolist() == whole[:].tolist()
    assert capsys.readouterr().err == ""


def test_two_that_prepare_one_folder_both_end_well(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done, real, started = [], documents.encode, threading.Event()

    def encode(piece: Any, *given: Any) -> Any:
        done.append(piece)
        if len(done) == 1:
            other.start()
            started.wait(5)
        return real(piece, *given)

    def second() -> None:
        real_flock = shard_writer.fcntl.flock

        def flock(handle: int, how: int) -> None:
            started.set()  # the first may go on
            real_flock(handle, how)

        monkeypatch.setattr(shard_writer.fcntl, "flock", flock)
        found.append(prepare(text, tmp_path / "out", 1, 1000))

    found: list[TokenShards] = []
    other = threading.Thread(target=second)
    monkeypatch.setattr(documents, "encode", encode)
    found.append(prepare(text, tmp_path / "out", 1, 1000))
    other.join()
    assert np.array_equal(found[0][:], found[1][:])
    assert len({piece[1:3] for piece in done}) == len(done)  # none twice
    assert "waiting for another process" in capsys.readouterr().err


def test_a_full_disk_leaves_what_is_done(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "out", files.flush

    def flush(path: Path) -> None:
        if path.name.startswith("00002.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", flush)
        assert "No space left" in refused(lambda: prepare(text, folder, 1, 1000))
    assert content_of(folder).keys() == {"00000.bin", "00001.bin", "progress.json", "lock"}
    assert "run the command that began it again" in refused(lambda: TokenShards(folder))
    prepare(text, folder, 1, 1000)
    prepare(text, tmp_path / "whole", 1, 1000)
    assert content_of(folder) == content_of(tmp_path / "whole")


@pytest.mark.parametrize("ends", ["within", "with a piece", "in its middle", "with the text"])
def test_a_piece_of_many_shards_is_gone_on_with_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """At every shard, once and again and again; shards that end where a piece or the text does."""
    monkeypatch.setattr(documents, "PIECE", 400)
    (tmp_path / "a.txt").write_text("".join(LINES[:18]))
    (tmp_path / "b.txt").write_text("The end.")
    text = identify(find_files([str(tmp_path)]), "text")
    pieces = list(documents.pieces(text.files, "text"))
    lengths = [len(documents.encode(piece, "text")[0]) for piece in pieces]
    assert len(lengths) == 3
    assert min(lengths[:2]) > 100
    size = {
        "within": 31,
        "with a piece": lengths[0],
        "in its middle": -(-lengths[0] // 4),
        "with the text": sum(lengths),
    }[ends]
    found = prepare(text, tmp_path / "whole", 1, size)
    expected = [i for piece in pieces for i in documents.encode(piece, "text")[0].tolist()]
    assert found[:].tolist() == expected
    assert len(found.index.shards) == -(-len(expected) // size)  # none of them empty
    whole = content_of(tmp_path / "whole")
    for shard in found.index.shards:
        once = tmp_path / f"once {shard.name}"
        stopped_at(shard.name, text, once, size)
        stopped_at(shard.name, text, tmp_path / "again", size)
        prepare(text, once, 1, size)
        assert content_of(once) == whole
    prepare(text, tmp_path / "again", 1, size)
    assert content_of(tmp_path / "again") == whole


def test_a_killed_worker_is_told(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(piece: Any, *given: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    encode.__module__, encode.__qualname__ = documents.__name__, "encode"
    monkeypatch.setattr(documents, "encode", encode)
    assert "fewer --workers" in refused(lambda: prepare(text, tmp_path / "out", 2, 1000))


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_cannot_be_read_is_named(text: Text, tmp_path: Path, workers: int) -> None:
    path = text.files[1]
    assert path.name == "b.jsonl"
    path.write_text(path.read_text() + "\n{}\n")
    changed = identify(text.files, "text")
    said = refused(lambda: prepare(changed, tmp_path / "out", workers, 1000))
    assert f"{path}: line 62 is not a JSON object" in said
    path.write_bytes(b"abc \xff def")
    changed = identify([path.rename(tmp_path / "b.txt")], "text")
    said = refused(lambda: prepare(changed, tmp_path / "other", workers, 1000))
    assert "b.txt: cannot be read as UTF-8 (byte 4" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "changed while it was read"), (None, "a.txt: cannot be read")],
    ids=["shrinks", "vanishes"],
)
def test_text_that_changes_while_it_is_read(
    text: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    message: str,
) -> None:
    real, path = documents.encode, text.files[0]

    def encode(piece: Any, *given: Any) -> Any:
        ids = real(piece, *given)
        if piece.start and path.exists():
            path.unlink() if content is None else path.write_bytes(content)
        return ids

    monkeypatch.setattr(documents, "encode", encode)
    said = refused(lambda: prepare(text, tmp_path / "out", 1, 1000))
    assert message in said or "a.txt: shrank while it was read" in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_another_text_is_never_written_over(text: Text, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert killed_at(9, text, folder, 1) == -signal.SIGKILL
    other = text._replace(key="another")
    for unfinished in (True, False):
        before = content_of(folder)
        assert "tokens of another text" in refused(lambda: prepare(other, folder, 1, 1000))
        assert "in shards of another size" in refused(lambda: prepare(text, folder, 1, 10))
        assert content_of(folder) == before
        if unfinished:
            prepare(text, folder, 1, 1000)
    (folder / "index.json").unlink()
    assert "holds shards without an index" in refused(lambda: prepare(text, folder, 1, 1000))
