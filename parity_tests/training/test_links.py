"""Links in a run directory from elsewhere: what they point to is not written to."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from llama_common.errors import InputError
from llama_torch import train
from llama_torch.checkpoint.single_file import SingleFile
from llama_torch.checkpoint.state_interface import TrainingState
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import find_files, identify
from llama_torch.training import run_dir
from tools import plot

from ..support.survival import STEPS, resume
from ..support.trainer_runs import refused


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a file of the user's."""
    path = tmp_path / "mine" / "text.txt"
    path.parent.mkdir()
    path.write_text("dear to me")
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of a run that has a step left to do."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    return out


def test_a_lock_that_is_a_link_is_refused(
    run: Path, mine: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "lock").unlink()
    new = tmp_path / "new"
    new.mkdir()
    for out, argv in (
        (run, ["--resume", "--out", str(run)]),
        (new, [*flags, "--out", str(new)]),
    ):
        for target in (mine, tmp_path / "absent"):
            (out / "lock").symlink_to(target)
            assert f"{out}/lock: is a link" in _line(argv, capsys)
            (out / "lock").unlink()
    assert mine.read_text() == "dear to me"
    assert not (tmp_path / "absent").exists()


def _line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_lock_keeps_its_content(run: Path) -> None:
    (run / "lock").write_text("not ours")
    with run_dir.lock(run), pytest.raises(InputError, match="in use"), run_dir.lock(run):
        pass
    assert (run / "lock").read_text() == "not ours"


@pytest.mark.parametrize("name", ["checkpoints", "best", "tensorboard"])
def test_a_folder_that_is_a_link_is_refused(
    name: str, run: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / name, mine.parent / name)
    shutil.rmtree(run / name)
    (run / name).symlink_to(mine.parent / name)
    before = {path: path.stat() for path in mine.parent.rglob("*") if path.is_file()}
    assert f"{run}/{name}: is a link" in refused(["--resume", "--out", str(run)], capsys)
    assert before == {path: path.stat() for path in mine.parent.rglob("*") if path.is_file()}


def test_files_that_are_links_are_replaced(run: Path, mine: Path) -> None:
    names = [
        "model.safetensors",
        *("checkpoints/6.tmp", "checkpoints/5.shards.tmp", "best.tmp"),
    ]
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine.parent if name.endswith(".tmp") else mine)
    assert resume(run) == 0
    assert list(mine.parent.iterdir()) == [mine]
    assert mine.read_text() == "dear to me"
    assert not any((run / name).is_symlink() for name in names)
    assert not list(run.rglob("*.tmp"))


def test_a_trace_replaces_a_link(flags: list[str], mine: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "trace.json").symlink_to(mine)
    assert train.main([*flags, "--out", str(new), "--profile"]) == 0
    assert mine.read_text() == "dear to me"
    assert not (new / "trace.json").is_symlink()
    assert (new / "trace.json").stat().st_size > 1000


def test_a_temporary_copy_in_shards_follows_no_link(
    tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "5"
    folder.mkdir()
    tensors = {"parameter.a": torch.arange(3.0)}
    SingleFile(folder).write(TrainingState(tensors, 5, []))
    (tmp_path / "5.shards.tmp").symlink_to(mine.parent)
    monkeypatch.setattr("llama_torch.checkpoint.single_file.is_sharded", lambda _: True)
    with warnings.catch_warnings(action="ignore"):  # torch tells that there is no job
        found = SingleFile(folder).read_like(tensors)
    assert torch.equal(found["parameter.a"], tensors["parameter.a"])
    assert list(mine.parent.iterdir()) == [mine]
    assert not (tmp_path / "5.shards.tmp").is_symlink()


def test_a_folder_of_tokens_follows_no_link(tmp_path: Path, mine: Path) -> None:
    text, out = identify(find_files([str(mine)]), "text"), tmp_path / "tokens"
    out.mkdir()
    (out / "lock").symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(text, out, 1)
    assert not (tmp_path / "absent").exists()


def test_a_link_that_the_user_names_is_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "curve.svg").write_text("an earlier curve")
    (tmp_path / "link.svg").symlink_to(tmp_path / "curve.svg")
    assert plot.main([str(run), str(tmp_path / "link.svg")]) == 0
    assert (tmp_path / "link.svg").is_symlink()
    assert "<svg" in (tmp_path / "curve.svg").read_text()
