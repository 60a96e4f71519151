"""A dry run's figures on a machine that others use too."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_torch import train
from llama_torch.training import dry_run

from ..support.trainer_runs import SMALL_RUN, TEXT

LONG = ["--steps", "1000", "--eval-every", "1000", "--save-every", "1000", "--sample-every", "0"]


class Clock:
    """A clock that training steps advance, the first by its compilation too, and nothing else."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self.seconds = 0.0, seconds
        self.steps = 0

    def step(self, *args: Any, **settings: Any) -> tuple[SimpleNamespace]:
        self.now += next(self.seconds)
        self.steps += 1
        return (SimpleNamespace(),)


def dry(seconds: Iterator[float], tmp_path: Path, capsys: Any, patch: pytest.MonkeyPatch) -> str:
    clock = Clock(seconds)
    patch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    patch.setattr(dry_run, "train_step", clock.step)
    patch.setattr(dry_run, "_disk_speed", lambda out: 1e9)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    flags = [*SMALL_RUN, *LONG, "--data", str(path), "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--dry-run"]) == 0
    assert clock.steps >= 2 + dry_run.FEWEST
    printed: str = capsys.readouterr().out
    return printed


def test_a_steady_machine_is_not_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.chain([9.0, 3.0], itertools.cycle([0.5, 0.55, 0.45]))
    printed = dry(seconds, tmp_path, capsys, monkeypatch)
    assert "steps took" not in printed
    assert "steps 500, the first step's preparation 8" in printed
    assert "64 tokens/s" in printed


def test_a_step_that_was_held_up_changes_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean would say 14 times as much."""
    seconds = itertools.chain([0.5] * 5, [50.0], itertools.repeat(0.5))
    printed = dry(seconds, tmp_path, capsys, monkeypatch)
    assert "steps 500, " in printed
    assert "steps took" not in printed


def test_steps_that_scatter_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.chain([1.0, 4.0], itertools.cycle([0.8, 9.1, 1.2]))
    printed = dry(seconds, tmp_path, capsys, monkeypatch)
    line = "steps took 0.8 to 9.1 s: is the machine busy? The times below are of the median, 1.2 s"
    assert line in printed.splitlines()
    assert "steps 1200, " in printed
