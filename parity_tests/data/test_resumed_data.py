"""A run whose --data was relative, resumed from another working directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_torch import train
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import find_files, identify

from ..support import state_files
from ..support.trainer_runs import scalars, stop_after

FLAGS = ["--dim", "8", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1", "--device", "cpu"]
FLAGS += ["--max-seq-len", "16", "--steps", "2", "--sample-every", "0", "--eval-every", "2"]
FLAGS += ["--batch-size", "2", "--log-every", "1", "--save-every", "1"]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return the function that takes one step of two on a relative --data; it returns the run."""
    here = tmp_path / "here [1]"  # a glob's characters
    (here / "t").mkdir(parents=True)
    (here / "t/a.txt").write_text("a text of many words. " * 100)
    prepare(identify(find_files([str(here / "t/a.txt")]), "text"), here / "shards", 1)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def work(data: str) -> Path:
        monkeypatch.chdir(here)
        with monkeypatch.context() as patch:
            stop_after(1, patch)
            assert train.main(["--data", data, "--out", "run", *FLAGS]) == 130
        monkeypatch.chdir(tmp_path / "other")
        return here / "run"

    return work


@pytest.mark.parametrize("data", ["t/*.txt", "t", "t/a.txt", "shards"])
def test_it_goes_on_with_the_text_where_it_began(
    begin: Callable[..., Path],
    data: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the losses of a run that nothing interrupted."""
    run = begin(data)
    assert train.main(["--resume", "--out", str(run)]) == 0, capsys.readouterr()
    monkeypatch.chdir(run.parent)
    assert train.main(["--data", data, "--out", "whole", *FLAGS]) == 0
    found, whole = scalars(run), scalars(run.parent / "whole")
    assert [step for step, _ in whole["train/loss"]] == [1, 2]
    for tag in ("train/loss", "val/loss"):
        assert found[tag] == whole[tag]


@pytest.mark.parametrize("data", ["t/*.txt", "t", "t/a.txt", "shards"])
def test_a_directory_that_the_name_of_the_first_matches_is_not_searched(
    begin: Callable[..., Path],
    tmp_path: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a glob, "here [1]" is "here 1"."""
    run = begin(data)
    shutil.copytree(run.parent / "t", tmp_path / "here 1" / "t")
    (tmp_path / "here 1" / "t" / "a.txt").write_text("another text of many words. " * 100)
    shutil.copytree(run.parent / "shards", tmp_path / "here 1" / "shards")
    capsys.readouterr()
    resume = ["--resume", "--out", str(run)]
    assert train.main(resume) == 0, capsys.readouterr()
    for name in ("t", "shards"):
        (run.parent / name).rename(tmp_path / f"moved {name}")
    assert train.main(resume) == 2
    assert f"--data {data}: no file found in" in capsys.readouterr().err


def test_text_that_is_found_nowhere_is_one_line(
    begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin("t/*.txt")
    (run.parent / "t").rename(tmp_path / "moved")
    capsys.readouterr()
    resume = ["--resume", "--out", str(run)]
    assert train.main(resume) == 2
    remedy = "name the same text by --data, or run this in the folder that holds it"
    assert capsys.readouterr().err == (
        f"error: --resume: --data t/*.txt: no file found in {tmp_path}/other nor in {run.parent}, "
        f"where the run began; {remedy}\n"
    )
    record = state_files.read(run / "run.json")
    del record["directory"]  # as an earlier version wrote it
    (run / "run.json").write_text(json.dumps(record))
    assert train.main(resume) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: --resume: --data t/*.txt: no file found in {tmp_path}/other; {remedy}\n"
    )
    assert train.main([*resume, "--data", f"{tmp_path}/moved"]) == 0
    assert [step for step, _ in scalars(run)["train/loss"]] == [1, 2]


def test_the_text_beside_the_command_comes_first(
    begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin("t")
    (tmp_path / "other/t").mkdir()
    (tmp_path / "other/t/a.txt").write_text("another text of many words. " * 100)
    assert train.main(["--resume", "--out", str(run)]) == 2
    where = f"(this is {tmp_path}/other; it began in {run.parent})"
    assert f"the text of --data has changed {where}; drop" in capsys.readouterr().err
