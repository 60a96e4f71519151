"""The speed in the log is that of training alone, and never beyond the device's peak."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_torch import train
from llama_torch.training import loop, periodic, profiler, progress, throughput, validate, verify
from llama_torch.training.clock import TrainingClock
from llama_torch.training.file_saver import FileSaver

from ..support.trainer_runs import SMALL_RUN, TEXT, scalars

STEP_SECONDS, OTHER_SECONDS = 0.5, 1000.0
TOKENS_PER_STEP = 32  # of SMALL_RUN
LOG_EVERY = 4
EVENTS = {
    "validations": ["--eval-every", "3"],
    "samples": ["--sample-every", "2"],
    "checks by the oracle": ["--verify-every", "3"],
    "a profile": ["--profile"],
    "checkpoints": ["--save-every", "1"],
    "checkpoints with the log": ["--save-every", "4"],
    "checkpoints out of step": ["--save-every", "3"],
    "all": ["--eval-every", "2", "--sample-every", "3", "--save-every", "1", "--profile"],
}
# Whose checkpoints are completed while training goes on.
LATE = ("checkpoints", "checkpoints with the log", "checkpoints out of step", "all")
AT_ONCE = ("validations", "samples", "checks by the oracle", "a profile", "checkpoints", "all")


class Clock:
    """The time of day in a test, which passes where a call is said to take so long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.monkeypatch = 0.0, monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return call(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, timed)


class LateSaver(FileSaver):
    """Completes a checkpoint while training goes on, as shards on a GPU are written."""

    pending: int | None = None

    def save(self, step: int, skipped: Sequence[int], wait: bool) -> list[int]:
        """Return the steps completed: the one before, and this one only if ``wait``."""
        found = [*self.completed(), *super().save(step, skipped, wait)]
        self.pending = None if wait else found.pop()
        return found

    def completed(self) -> list[int]:
        """Return the step that was saved by the last call, if any."""
        found = [] if self.pending is None else [self.pending]
        self.pending = None
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock by which a training step takes half a second, and all else a quarter of an hour."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: 1e12)
    clock.takes(STEP_SECONDS, loop, "train_step")
    for owner, name in (
        *((validate, "measure"), (periodic, "sample_text"), (verify, "check")),
        *((FileSaver, "save"), (LateSaver, "completed"), (profiler, "atomic_write")),
    ):
        clock.takes(OTHER_SECONDS, owner, name)
    return clock


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    quiet = ["--steps", "12", "--eval-every", "99", "--sample-every", "0", "--save-every", "99"]
    quiet += ["--log-every", str(LOG_EVERY)]
    data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    return [*SMALL_RUN, *quiet, *data]


def require_speed_of_training(out: Path, steps: Sequence[int]) -> None:
    speeds = scalars(out)["train/tokens_per_second"]
    assert speeds == [(step, TOKENS_PER_STEP / STEP_SECONDS) for step in steps]


@pytest.mark.parametrize(
    ("what", "late"),
    [*((what, False) for what in AT_ONCE), *((what, True) for what in LATE)],
)
@pytest.mark.usefixtures("clock")
def test_what_happens_between_steps_takes_no_time_of_training(
    what: str,
    late: bool,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finished save, reported with the step's metrics, made it 2,874,423,786 tokens/s."""
    if late:
        monkeypatch.setattr("llama_torch.training.saver.FileSaver", LateSaver)
    assert train.main([*flags, *EVENTS[what]]) == 0
    require_speed_of_training(tmp_path / "run", [4, 8, 12])


@pytest.mark.usefixtures("clock")
def test_the_first_validation_of_a_resumed_run_takes_no_time_of_training(
    flags: list[str], tmp_path: Path
) -> None:
    assert train.main(flags) == 0
    more = ["--resume", "--out", str(tmp_path / "run"), "--steps", "16"]
    assert train.main(more) == 0
    require_speed_of_training(tmp_path / "run", [4, 8, 12, 16])


@pytest.mark.parametrize(("share", "is_shown"), [(0.99, True), (1.01, False)])
def test_no_speed_beyond_the_peak_is_shown(
    share: float,
    is_shown: bool,
    clock: Clock,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever of the two is measured wrongly, no device computes faster than it can."""
    peak = TOKENS_PER_STEP / STEP_SECONDS / share
    clock.monkeypatch.setattr(progress, "peak_tokens_per_second", lambda *_: peak)
    assert train.main(flags) == 0
    printed, tags = capsys.readouterr().out, scalars(tmp_path / "run").keys()
    assert ("64 tokens/s  MFU 99.0%" in printed) == is_shown
    assert ("speed not known: measured beyond the device's peak" in printed) != is_shown
    of_speed = {"train/tokens_per_second", "train/mfu"}
    assert tags & of_speed == (of_speed if is_shown else set())
    assert "train/peak_memory_gib" in tags


def test_the_clock_waits_for_a_gpu_before_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU still computes steps when the host has launched them, and so waits elsewhere."""
    now, queued = [0.0], [0.0]

    def synchronize(device: torch.device) -> None:
        now[0] += queued.pop()
        queued.append(0.0)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = TrainingClock(torch.device("cuda"))
    clock.start()
    queued[0] = 3.0  # a step is launched
    with clock.stopped():
        now[0] += 100
    assert clock.take() == 3.0
    queued[0] = 2.0
    assert clock.take() == 2.0
