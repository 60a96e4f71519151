"""Token shards: the same bytes however they came to be, and no accident without a clear word."""

import errno
import gc
import itertools
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_torch import prepare as data
from llama_torch.common import files
from llama_torch.common.errors import InputError
from llama_torch.config import DataConfig
from llama_torch.data import documents, shard_writer, shards
from llama_torch.data.corpus import Corpus, Source, load_corpus
from llama_torch.data.documents import Text, find_files, identify
from llama_torch.data.loader import train_batches
from llama_torch.data.shard_writer import prepare
from llama_torch.data.shards import Shards
from llama_torch.tokenizer.gpt2 import END_OF_TEXT_ID, gpt2

# White space of every kind, what GPT-2's pattern treats apart, and characters of 1 to 4 bytes.
SPACES = "   \n\n\r\t\x0b\x1c\x85\u00a0\u2003\u3000"
OTHERS = "ab'sl19.!<é中あ한😀\u0301ß"
runs = st.text(SPACES, max_size=4) | st.text(OTHERS, min_size=1, max_size=6)
texts = st.lists(runs, max_size=12).map("".join)
LINES = [f"Line {i} tells of {i * i} llamas, and a hill.\n" for i in range(60)]


def ids_of(text: str) -> list[int]:
    return gpt2().encode_ordinary(text.replace("\r\n", "\n").replace("\r", "\n"))


@given(text=texts)
@example("a\r\nb")
@example("a\n\n\n\nb")
@example("a\n\n  b")
@example("a\n\n\u3000b")
@example("a\n\n\u2003b")
@example("a\n\n\u00a0b")
def test_text_cut_at_a_border_has_the_ids_of_the_whole(text: str) -> None:
    content = text.encode()
    found = documents.BORDER.match(content)
    while found and found.start(1):
        cut = found.start(1)
        parts = content[:cut].decode(), content[cut:].decode()
        assert ids_of(parts[0]) + ids_of(parts[1]) == ids_of(text), parts
        found = documents.BORDER.match(content[:cut])


@given(text=texts, size=st.integers(4, 30), bom=st.booleans())
@example("aa\r\naaaa", 4, False)
def test_pieces_are_the_whole_text_from_wherever_one_begins(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int, bom: bool
) -> None:
    """Text without borders is cut too, between characters and never within a line end."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(documents.BOM * bom + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = list(documents.pieces([path], "text"))
        assert all(0 < len(piece.content) <= size for piece in pieces)
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * (
            len(pieces) > 0
        )
        found = [part for piece in pieces for part in documents.texts(piece, "text")]
        # A byte-order mark that is text, after the first, stays.
        assert "".join(found) == text.replace("\r\n", "\n").replace("\r", "\n")
        for i, piece in enumerate(pieces):
            assert list(documents.pieces([path], "text", 0, piece.start)) == pieces[i:]


def test_a_column_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Not even where all rows are one group, as some tools write them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rng, path = np.random.default_rng(0), tmp_path / "a.parquet"
    rows = [rng.bytes(8000).hex() for _ in range(2500)]
    table = pyarrow.table({"text": rows})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    del table
    pool = pyarrow.default_memory_pool()
    before, size = pool.bytes_allocated(), path.stat().st_size
    held = [pool.bytes_allocated() - before for _ in documents.pieces([path], "text")]
    assert len(held) > 10
    assert max(held) < size * 0.7  # some 18 MB are held whatever the size


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    """Files of every kind, each of several pieces."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "PIECE", 500)
    monkeypatch.setattr(documents, "ROWS", 7)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(LINES))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    table = pyarrow.table({"text": [None, *LINES, ""]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=25)
    (folder / "d.md").write_text("")
    (folder / "e.md").write_text("The end.")
    return identify(find_files([str(folder)]), "text")


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_the_documents(text: Text, tmp_path: Path) -> None:
    expected = []
    for document in ["".join(LINES), *LINES, *LINES, "The end."]:
        expected += [*gpt2().encode_ordinary(document), END_OF_TEXT_ID]
    found = prepare(text, tmp_path / "out", 1, 1000)
    assert found[:].tolist() == expected
    assert found.dtype == np.uint16
    assert len(found) == len(expected)
    assert found[995:2003].tolist() == expected[995:2003]  # over three shards
    borders = [0, 1, 17, 500, 999, 1000, 1001, 2000, 2001, len(expected) - 1, len(expected)]
    for start, stop in itertools.combinations_with_replacement(borders, 2):
        assert found[start:stop].tolist() == expected[start:stop]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["tokens"] for shard in index["shards"][:-1]] == [1000] * (len(expected) // 1000)
    assert index["highest"] == END_OF_TEXT_ID
    assert shards.damaged_shards(found) == []


def test_a_text_without_tokens_has_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    found = prepare(identify([tmp_path / "a.txt"], "text"), tmp_path / "out", 1, 10)
    assert (len(found), found.index.highest, found.index.shards) == (0, -1, ())
    assert found[:].tolist() == []


def test_the_number_of_processes_changes_nothing(text: Text, tmp_path: Path) -> None:
    prepare(text, tmp_path / "one", 1, 1000)
    prepare(text, tmp_path / "three", 3, 1000)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "three")


def in_child(work: Callable[[], Any]) -> int:
    """Run ``work`` in a process of its own that shares all that is imported; return its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork beside threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(moment: int, text: Text, folder: Path, workers: int) -> int:
    """Prepare in a process that is killed when it waits for the disk the ``moment``-th time."""

    def work() -> None:
        moments, real = iter(range(moment)), files.flush

        def flush(path: Path) -> None:
            if next(moments, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "flush", flush)
            prepare(text, folder, workers, 1000)

    return in_child(work)


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
    monkeypatch.setattr(documents, "encode", lambda p, t: done.append(p[1:3]) or real(p, t))
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


def test_two_that_prepare_one_folder_both_end_well(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done, real, started = [], documents.encode, threading.Event()

    def encode(piece: Any, text_field: str) -> Any:
        done.append(piece)
        if len(done) == 1:
            other.start()
            started.wait(5)
        return real(piece, text_field)

    def second() -> None:
        real_flock = shard_writer.fcntl.flock

        def flock(handle: int, how: int) -> None:
            started.set()  # the first may go on
            real_flock(handle, how)

        monkeypatch.setattr(shard_writer.fcntl, "flock", flock)
        found.append(prepare(text, tmp_path / "out", 1, 1000))

    found: list[Shards] = []
    other = threading.Thread(target=second)
    monkeypatch.setattr(documents, "encode", encode)
    found.append(prepare(text, tmp_path / "out", 1, 1000))
    other.join()
    assert np.array_equal(found[0][:], found[1][:])
    assert len({piece[1:3] for piece in done}) == len(done)  # none twice
    assert "waiting for another process" in capsys.readouterr().err


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert "run the command that began it again" in refused(lambda: Shards(folder))
    prepare(text, folder, 1, 1000)
    prepare(text, tmp_path / "whole", 1, 1000)
    assert content_of(folder) == content_of(tmp_path / "whole")


def stopped_at(name: str, text: Text, folder: Path, size: int) -> None:
    """Prepare until the disk is full at the shard ``name``."""
    real = files.flush

    def flush(path: Path) -> None:
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "flush", flush)
        assert "No space left" in refused(lambda: prepare(text, folder, 1, size))


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
    lengths = [len(documents.encode(piece, "text")) for piece in pieces]
    assert len(lengths) == 3
    assert min(lengths[:2]) > 100
    size = {
        "within": 31,
        "with a piece": lengths[0],
        "in its middle": -(-lengths[0] // 4),
        "with the text": sum(lengths),
    }[ends]
    found = prepare(text, tmp_path / "whole", 1, size)
    expected = [i for piece in pieces for i in documents.encode(piece, "text").tolist()]
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
    def encode(piece: Any, text_field: str) -> None:
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

    def encode(piece: Any, text_field: str) -> Any:
        ids = real(piece, text_field)
        if piece.start and path.exists():
            path.unlink() if content is None else path.write_bytes(content)
        return ids

    monkeypatch.setattr(documents, "encode", encode)
    said = refused(lambda: prepare(text, tmp_path / "out", 1, 1000))
    assert message in said or "a.txt: shrank while it was read" in said
    assert not (tmp_path / "out" / "index.json").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def edit(**changes: Any) -> Callable[[Path], None]:
    def work(path: Path) -> None:
        index = path.parent / "index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | changes))

    return work


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "00001.bin: token shard has 1998 bytes and should have 2000"),
        (Path.unlink, "00001.bin: token shard cannot be read (No such file"),
        (lambda path: truncate(path.parent / "index.json"), "index.json: is not JSON"),
        (lambda path: (path.parent / "index.json").unlink(), "index.json: cannot be read"),
        (edit(tokens=5), "damaged index (its shards do not add up to 5 tokens)"),
        (edit(tokens="5"), "damaged index (tokens is '5')"),
        (edit(shards=[{}]), "damaged index ("),
        (edit(shards=None), "damaged index ("),
        (edit(more=1), "damaged index ("),
        (edit(dtype="float16"), "damaged index (dtype 'float16'"),
        (edit(shard_tokens=0), "damaged index (dtype 'uint16', 0"),
        (edit(version=2), "index.json: is not of format"),
        (edit(encoding="else"), "index.json: holds ids of another encoding"),
    ],
)
def test_damage_is_named_before_a_run(
    text: Text, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    prepare(text, tmp_path / "out", 1, 1000)
    damage(tmp_path / "out" / "00001.bin")
    config = DataConfig(data=(str(tmp_path / "out"),))
    assert message in refused(lambda: load_corpus(config, 50257, 8))


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES))
    config = DataConfig(data=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"))
    load_corpus(config, 50257, 8)
    (cached,) = (tmp_path / "cache").glob("*/*.bin")
    truncate(cached)
    assert f"delete {cached.parent}" in refused(lambda: load_corpus(config, 50257, 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_during_a_run(text: Text, tmp_path: Path, workers: int) -> None:
    """Of a mapped file this would be SIGBUS, and the end of the process without a word."""
    tokens = prepare(text, tmp_path / "out", 1, 1000)
    corpus = Corpus((Source(tokens, tokens, "text"),), (1.0,), "key")
    settings = {"seed": 0, "rows": 8, "first": 0, "last": 50, "workers": workers}
    batches = train_batches(corpus, 8, **settings)
    next(batches)
    for path in (tmp_path / "out").glob("*.bin"):
        os.truncate(path, 100)
    said = refused(lambda: list(batches))
    assert ".bin: token shard was cut short while it was in use; copy it back" in said
    assert not multiprocessing.active_children()  # nothing holds the loader, and so its process


def test_many_shards_keep_few_files_open(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "OPEN", 3)
    prepare(text, tmp_path / "out", 1, 100)

    def n_open() -> int:
        paths = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        return sum(path.startswith(f"{tmp_path}/out/") for path in paths)

    def use() -> None:
        found = Shards(tmp_path / "out")
        whole = found[:]
        assert len(found.index.shards) > 20
        assert n_open() == 3
        os.truncate(tmp_path / "out" / "00000.bin", 0)
        assert "00000.bin: token shard has 0 bytes" in refused(lambda: found[:5])
        assert np.array_equal(found[150:250], whole[150:250])

    use()
    gc.collect()  # the refusal's traceback
    assert n_open() == 0


def test_ids_that_need_32_bits(tmp_path: Path, text: Text) -> None:
    prepare(text, tmp_path / "out", 1, 1000)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for shard in index["shards"]:
        path = tmp_path / "out" / shard["name"]
        (np.fromfile(path, "<u2").astype("<u4") + 100_000).tofile(path)
    edit(dtype="uint32", highest=index["highest"] + 100_000)(path)
    found = Shards(tmp_path / "out")
    assert found.dtype == np.uint32
    assert found[:].min() >= 100_000
    config = DataConfig(data=(str(tmp_path / "out"),))
    assert "use at least 150257" in refused(lambda: load_corpus(config, 50257, 8))


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


def test_the_command_line(text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    flags = ["--data", *map(str, text.files), "--out", out, "--shard-tokens", "1000"]
    for _ in range(2):  # the second has nothing to do
        assert data.main([*flags, "--workers", "1"]) == 0
        assert "tokens in 3 shards of uint16" in capsys.readouterr().out
    assert data.main(["--verify", out]) == 0
    assert "3 of 3 shards are as written" in capsys.readouterr().out
    path = tmp_path / "out" / "00002.bin"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert data.main(["--verify", out]) == 1
    said = capsys.readouterr().out
    assert f"{path}: is not what was written" in said
    assert "2 of 3" in said
    for argv, message in (
        (["--data", flags[1]], "--out is needed"),
        (["--out", out, "--shard-tokens", "0"], "--shard-tokens must be positive"),
        (["--out", out, "--workers", "-1"], "--workers must not be negative"),
        (["--verify", str(tmp_path)], "index.json: cannot be read"),
    ):
        assert data.main(argv) == 2
        assert message in capsys.readouterr().err
