"""State files of token preparation: a changed one is refused, or changes nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_common.errors import LONGEST, InputError
from llama_torch import prepare as command
from llama_torch.config import DataConfig
from llama_torch.data import documents
from llama_torch.data.corpus import load_corpus
from llama_torch.data.shard_writer import prepare
from llama_torch.data.shards import TokenShards
from llama_torch.data.text_files import Text, identify

from ..support import state_files
from ..support.token_shards import LINES, content_of, edit, refused, stopped_at

SIZE = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, Path, Path]:
    """Return a text of several pieces, its shards, and a folder stopped before its third shard."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text("".join(LINES[:30]))
    rows = [*LINES[30:40], None, *LINES[40:]]
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    text = identify([folder / "a.txt", folder / "b.jsonl"], "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 400)
        prepare(text, folder / "whole", 1, SIZE)
        stopped_at("00002.bin", text, folder / "stopped", SIZE)
    return text, folder / "whole", folder / "stopped"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 400)


def copy(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("renew", [False, True], ids=["kept checksum", "renewed checksum"])
def test_a_changed_progress_is_refused_or_changes_nothing(
    made: tuple[Text, Path, Path], tmp_path: Path, renew: bool
) -> None:
    """Counts of nulls alone may be another's: they change a message, and no token."""
    text, whole, stopped = made
    folder, expected = tmp_path / "out", content_of(whole)

    def go_on() -> dict[str, bytes]:
        changed = (folder / "progress.json").read_bytes()
        copy(stopped, folder)
        (folder / "progress.json").write_bytes(changed)
        prepare(text, folder, 1, SIZE)
        return content_of(folder)

    def same(found: dict[str, bytes]) -> bool:
        tokens = {name: content for name, content in found.items() if name != "index.json"}
        index = json.loads(found["index.json"]) | {"sha256": 0, "nulls": 0, "first_null_file": 0}
        other = json.loads(expected["index.json"]) | {"sha256": 0, "nulls": 0, "first_null_file": 0}
        return index == other and tokens.items() <= expected.items()

    copy(stopped, folder)
    content = state_files.read(folder / "progress.json")
    assert content["skip"] > 0
    assert content["start"] > 0
    mutations = state_files.mutations(content, renew)
    assert state_files.failures(mutations, folder / "progress.json", go_on, same) == []


@given(
    file=st.integers(0, 1),
    start=st.integers(0, 2000),
    skip=st.integers(0, 600),
    has_checksum=st.booleans(),
)
def test_no_other_place_is_gone_on_from(
    made: tuple[Text, Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    file: int,
    start: int,
    skip: int,
    has_checksum: bool,
) -> None:
    """Without a checksum, as an earlier version wrote it, all is tokenised anew."""
    text, whole, stopped = made
    folder = copy(stopped, tmp_path_factory.mktemp("other") / "out")
    content = state_files.read(folder / "progress.json")
    was = content["file"], content["start"], content["skip"]
    content |= {"file": file, "start": start, "skip": skip}
    if has_checksum:
        state_files.write(folder / "progress.json", content)
    else:
        (folder / "progress.json").write_text(json.dumps(content))
    try:
        prepare(text, folder, 1, SIZE)
    except InputError:
        assert has_checksum
        assert (file, start, skip) != was
    else:
        assert not has_checksum or (file, start, skip) == was
        assert content_of(folder) == content_of(whole)


def test_a_shard_that_changed_meanwhile_is_not_gone_on_with(
    made: tuple[Text, Path, Path], tmp_path: Path
) -> None:
    text, _, stopped = made
    folder = copy(stopped, tmp_path / "out")
    ids = np.fromfile(folder / "00000.bin", "<u2")
    ids[10] += 1
    ids.tofile(folder / "00000.bin")
    said = refused(lambda: prepare(text, folder, 1, SIZE))
    assert "progress.json: damaged (00000.bin is not what was written); delete" in said


@pytest.mark.parametrize("renew", [False, True], ids=["kept checksum", "renewed checksum"])
def test_a_changed_index_is_refused_or_changes_nothing(
    made: tuple[Text, Path, Path], tmp_path: Path, renew: bool
) -> None:
    _, whole, _ = made
    folder = copy(whole, tmp_path / "out")
    expected, content = TokenShards(whole), state_files.read(folder / "index.json")
    config = DataConfig(data=(str(folder),))

    def use() -> Any:
        tokens = load_corpus(config, 50257, 8).sources[0].train.tokens
        return tokens, tokens[:]

    def same(found: Any) -> bool:
        shards, ids = found
        index, other = shards.index, expected.index
        # A checksum, and the text's name, are looked at where they are compared with something.
        told = np.array_equal(ids, expected[:]) and ids.dtype == expected.dtype
        return told and (index.tokens, index.shard_tokens) == (other.tokens, other.shard_tokens)

    mutations = state_files.mutations(content, renew)
    assert state_files.failures(mutations, folder / "index.json", use, same) == []


def test_an_id_above_the_highest_of_the_index_is_refused_when_it_is_read(
    made: tuple[Text, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond a smaller vocabulary it would be read out of the embedding's bounds."""
    folder = copy(made[1], tmp_path / "out")
    edit(highest=999)(folder / "00000.bin")
    tokens = TokenShards(folder)
    assert "above 999 in index.json; copy it back" in refused(lambda: tokens[:])
    assert command.main(["--verify", str(folder)]) == 1
    assert "index.json: says that the highest id is 999, not 50256" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["index.json", "progress.json", "00000.bin"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(
    made: tuple[Text, Path, Path], tmp_path: Path, name: str
) -> None:
    folder = copy(made[1], tmp_path / "out")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "progress.json":
        (folder / "index.json").unlink()
        assert "without an index" in refused(lambda: prepare(made[0], folder, 1, SIZE))
    said = refused(lambda: TokenShards(folder))
    assert str(folder) in said


def test_verify_compares_with_the_text(
    made: tuple[Text, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of other tokens whose index was made to fit them."""
    text, whole, _ = made
    folder, names = copy(whole, tmp_path / "out"), list(map(str, text.files))
    argv = ["--verify", str(folder), "--workers", "1", "--data"]
    assert command.main([*argv, *names]) == 0
    said = capsys.readouterr().out
    n_tokens = len(TokenShards(whole))
    assert f"{folder}: all {n_tokens:,} tokens are the text's" in said
    assert command.main([*argv, names[0]]) == 2
    assert "holds the tokens of another text" in capsys.readouterr().err
    other = identify(text.files[:1], "text")
    prepare(other, tmp_path / "other", 1, SIZE)
    index = state_files.read(tmp_path / "other" / "index.json")
    state_files.write(tmp_path / "other" / "index.json", index | {"key": text.key})
    short = ["--verify", str(tmp_path / "other")]
    assert command.main(short) == 0
    n_short = len(TokenShards(tmp_path / "other"))
    capsys.readouterr()
    assert command.main([*short, "--workers", "1", "--data", *names]) == 1
    said = capsys.readouterr().out
    assert f"token {n_short:,} is not the text's; delete the folder and tokenise again" in said


@pytest.mark.parametrize("name", ["x" * 100_000, "x/" * 100_000, "x" * 300 + "*"])
def test_a_name_that_is_too_long_names_nothing(tmp_path: Path, name: str) -> None:
    config = DataConfig(data=(f"{tmp_path}/{name}",))
    said = refused(lambda: load_corpus(config, 50257, 8))
    assert "give a file, a folder that holds" in said
    assert len(said) <= LONGEST
    assert "is not the path of a file" in refused(lambda: TokenShards(tmp_path / name))
