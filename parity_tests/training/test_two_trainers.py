"""Two trainers in one directory, and a clock that jumps."""

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_common.errors import InputError
from llama_torch import train
from llama_torch.training import run_dir

from ..support.survival import call_before, require_same, resume, send_signal
from ..support.trainer_runs import refused, scalars

# Two trainers


def test_a_second_trainer_is_refused(
    flags: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with run_dir.lock(out):
        assert f"--out {out} is in use" in refused(["--resume", "--out", str(out)], capsys)
    assert resume(out) == 0


@pytest.mark.parametrize("first_ends", [True, False])
def test_of_two_new_runs_with_one_number_the_second_is_refused(
    first_ends: bool,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other run takes runs/1 while this one is set up."""
    monkeypatch.chdir(tmp_path)
    other = run_dir.lock(Path("runs/1"))
    with monkeypatch.context() as patch:
        start = (lambda: train.main(flags)) if first_ends else other.__enter__
        call_before("build", 1, start, patch)
        assert train.main(flags) == 2
    message = "already holds a run; add --resume" if first_ends else "is in use by another trainer"
    assert f"error: --out runs/1 {message}" in capsys.readouterr().err
    if not first_ends:
        assert os.listdir("runs/1") == ["lock"]
        other.__exit__(None, None, None)
    assert train.main(flags) == 0
    assert os.path.isfile("runs/2/run.json")


def test_a_lock_is_not_held_by_what_a_trainer_leaves_behind(tmp_path: Path) -> None:
    """Forked data workers outlive a killed trainer by seconds."""
    context = multiprocessing.get_context("fork")
    lives = context.Event()
    with run_dir.lock(tmp_path):
        worker = context.Process(target=lambda: lives.set() or time.sleep(60))
        worker.start()
        assert lives.wait(60)
        with pytest.raises(InputError, match="in use"), run_dir.lock(tmp_path):
            pass
    try:
        with run_dir.lock(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


# A clock that jumps


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every call of time.time jump by a year, back or forth."""
    now, jumps = time.time(), itertools.cycle([0.0, -3e7, 4e7, -5e7])
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    return


@pytest.mark.usefixtures("jumping")
def test_a_clock_that_jumps_changes_nothing(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stop_at in (2, 2, 1):
        with monkeypatch.context() as patch:
            call_before("train_step", stop_at, lambda: send_signal(signal.SIGTERM), patch)
            argv = ["--resume"] if Path("runs").exists() else flags
            assert train.main(argv) == 143
    os.utime("runs/1/checkpoints/5", (0, 0))
    assert train.main(["--resume"]) == 0
    out = Path("runs/1")
    require_same(whole, out)
    assert all(value > 0 for _, value in scalars(out)["train/tokens_per_second"])
    assert run_dir.resolve_config(flags).out == "runs/2"
