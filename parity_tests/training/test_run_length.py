"""Runs that are resumed without --out, when they are finished, or for another number of steps."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.config import OptimConfig
from llama_torch.training import run_dir
from llama_torch.training.optimizer import learning_rate

from ..support import state_files
from ..support.survival import STEPS, require_same, resume
from ..support.trainer_runs import refused, scalars, stop_after

OPTIM = OptimConfig(warmup_steps=2)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A finished run of STEPS steps."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    return out


def rates(out: Path) -> dict[int, float]:
    return dict(scalars(out)["train/lr"])


def record(out: Path) -> dict[str, Any]:
    return state_files.read(out / "run.json")


# A finished run


def test_a_finished_run_says_so_and_how_to_go_on(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "run.json").read_bytes()
    assert resume(run) == 0
    printed = capsys.readouterr().out
    loss = scalars(run)["val/loss"][-1][1]
    assert f"{run} was finished already: 6 of 6 steps, validation loss {loss:.3f}" in printed
    assert f"  python -m llama_torch.train --resume --out {run} --steps 12" in printed
    assert "finished in" not in printed
    assert "continuing" not in printed
    assert resume(run, "--steps", str(STEPS)) == 0
    assert "was finished already" in capsys.readouterr().out
    assert (run / "run.json").read_bytes() == before
    require_same(run, whole)


# Another length


@pytest.mark.parametrize("steps", [8, 12])
def test_a_finished_run_is_trained_longer(
    steps: int, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps that were taken stay as they are; the next follow the new schedule."""
    assert resume(run, "--steps", str(steps)) == 0
    printed = capsys.readouterr().out
    one, other = learning_rate(STEPS, steps, OPTIM), learning_rate(STEPS, STEPS, OPTIM)
    assert (
        f"the schedule ends at step {steps} now instead of 6: the learning rate of step 7 is "
        f"{one:.2e} instead of {other:.2e}"
    ) in printed
    assert f"continuing after step 6 of {steps}" in printed
    assert "finished in" in printed
    found, expected = rates(run), rates(whole)
    assert list(found) == list(range(1, steps + 1))
    for step, rate in found.items():
        new = learning_rate(step - 1, steps, OPTIM)
        assert rate == (expected[step] if step <= STEPS else pytest.approx(new, rel=1e-6)), step
    assert found[steps] == pytest.approx(OPTIM.lr * OPTIM.final_lr_ratio)


def test_a_stopped_run_may_be_cut_short_and_goes_on_so(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert train.main([*flags, "--out", str(out)]) == 130
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert resume(out, "--steps=4") == 130
    assert "the schedule ends at step 4 now instead of 6" in capsys.readouterr().out
    assert resume(out) == 0  # as run.json has it
    printed = capsys.readouterr().out
    assert "schedule" not in printed
    assert "continuing after step 3 of 4" in printed
    assert list(rates(out)) == [1, 2, 3, 4]
    assert rates(out)[4] == pytest.approx(OPTIM.lr * OPTIM.final_lr_ratio)
    assert [record(out)[part]["steps"] for part in ("settings", "identity")] == [4, 4]
    assert record(out)["lengths"] == [{"until_step": 2, "steps": 6}]


def test_a_longer_run_that_is_stopped_is_the_one_that_is_not_to_the_bit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert resume(run, "--steps", "10") == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert resume(other, "--steps", "10") == 130
    assert resume(other) == 0
    require_same(run, other)


def test_a_length_from_before_the_first_checkpoint_is_that_of_a_new_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert train.main([*flags, "--steps", "3", "--out", str(one)]) == 0
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        assert train.main([*flags, "--out", str(other)]) == 130
    assert resume(other, "--steps", "3") == 0
    name = f"checkpoints/3/{STATE_FILE}"
    mine, theirs = load_file(one / name), load_file(other / name)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_length_that_leaves_no_step_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "run.json").read_bytes()
    for steps in (1, STEPS - 1):
        said = refused(["--resume", "--out", str(run), "--steps", str(steps)], capsys)
        assert f"--steps {steps}: {run} has 6 of 6 steps done; give more than 6" in said
    assert resume(run, "--steps", "8") == 0
    said = refused(["--resume", "--out", str(run), "--steps", "7"], capsys)
    assert f"--steps 7: {run} has 8 of 8 steps done; give more than 8" in said
    assert "--steps must be positive" in refused(
        ["--resume", "--out", str(run), "--steps", "0"], capsys
    )
    assert (run / "run.json").read_bytes() != before


def test_a_length_that_no_flag_gave_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The schedule does not change by a file's default."""
    toml = tmp_path / "a.toml"
    toml.write_text("steps = 12\n")
    both = ["--resume", "--out", str(run), "--config", str(toml)]
    assert (
        f"error: --config {toml}: steps is 12 and the run's is 6; remove it, or give --steps 12"
    ) in refused(both, capsys)
    changed = record(run)
    changed["settings"]["steps"] = 9
    state_files.write(run / "run.json", changed)
    said = refused(["--resume", "--out", str(run)], capsys)
    assert f"error: {run}/run.json: steps is 9 and the run's is 6" in said
    assert train.main([*both, "--steps", "8"]) == 0
    assert list(rates(run)) == list(range(1, 9))


def test_a_dry_run_of_another_length_changes_nothing(run: Path) -> None:
    before = (run / "run.json").read_bytes()
    assert resume(run, "--steps", "12", "--dry-run") == 0
    assert (run / "run.json").read_bytes() == before


# Without --out


@pytest.fixture
def runs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs 1, 2 and mine, all of whose files are of 1970, in runs/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2", "mine"):
        shutil.copytree(whole, tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    for path in (tmp_path / "runs").rglob("*"):
        os.utime(path, (1000, 1000))
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["1", "2", "mine"])
@pytest.mark.parametrize("file", ["run.json", "lock", "checkpoints/6", "model.safetensors"])
def test_the_run_last_worked_on_is_resumed(
    name: str, file: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(runs / name / file, (2000, 2000))
    os.utime(runs / "notes", (3000, 3000))
    assert run_dir.resolve_config(["--resume"]).out == f"runs/{name}"
    error = capsys.readouterr().err
    assert error == f"note: --resume continues runs/{name}, the last worked on of 3 in runs/\n"


def test_a_single_run_is_named_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1", "2"):
        shutil.rmtree(runs / name)
    assert train.main(["--resume"]) == 0
    assert capsys.readouterr().err == "note: --resume continues runs/mine\n"
    assert train.main(["--resume", "--out", "runs/mine"]) == 0
    assert capsys.readouterr().err == ""
