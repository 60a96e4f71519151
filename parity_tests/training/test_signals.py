"""SIGINT and SIGTERM end a run after the current step, with a checkpoint."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from llama_torch import train
from llama_torch.checkpoint import hf, step_folders
from llama_torch.data import loader
from llama_torch.training import source

from ..support.survival import STEPS, call_before, left_over, require_same, resume, send_signal
from ..workers.killed_trainer import require_readable


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_in_hand_and_saves(
    number: int,
    code: int,
    flags: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, handlers = tmp_path / "run", [signal.getsignal(n) for n in (signal.SIGINT, number)]
    with monkeypatch.context() as patch:
        call_before("train_step", 3, lambda: send_signal(number), patch)
        assert train.main([*flags, "--save-every=1000", "--out", str(out)]) == code
    error = capsys.readouterr().err
    name = signal.Signals(number).name
    command = f"python -m llama_torch.train --resume --out {out}"
    assert error == f"stopped by {name}; continue after step 3 with: {command}\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, number)] == handlers
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["3"]
    assert resume(out) == 0
    require_same(whole, out)


def test_a_signal_to_all_leaves_a_data_worker_at_work(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's Ctrl-C reaches the worker too, here before it has read what is waited for."""
    out, read, batches = tmp_path / "run", loader.Windows.__getitem__, loader.train_batches
    sent, reads = tmp_path / "sent", itertools.count(1)

    def waits(self: loader.Windows, start: int) -> torch.Tensor:
        while get_worker_info() and next(reads) > 4 and not sent.exists():
            time.sleep(0.01)
        return read(self, start)

    def interrupted(windows: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        yield from itertools.islice(windows, 2)
        send_signal(signal.SIGINT)
        sent.touch()
        yield from windows

    with monkeypatch.context() as patch:
        patch.setattr(loader.Windows, "__getitem__", waits)
        patch.setattr(source, "train_batches", lambda *a, **k: interrupted(batches(*a, **k)))
        assert train.main([*flags, "--num-workers", "1", "--out", str(out)]) == 130
    assert step_folders.newest(out).name == "3"
    assert resume(out, "--num-workers", "0") == 0
    require_same(whole, out)


def test_a_signal_in_the_last_step_finishes_the_run(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_before("train_step", STEPS, lambda: send_signal(signal.SIGTERM), monkeypatch)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    require_same(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("load_corpus", "before the run began; nothing was written\n"),
        (
            "measure",
            "before the first checkpoint; begin again with: python -m llama_torch.train --resume",
        ),
    ],
)
def test_a_signal_before_the_first_step_ends_at_once(
    where: str,
    message: str,
    flags: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        call_before(where, 1, lambda: send_signal(signal.SIGTERM), patch)
        assert train.main([*flags, "--out", str(out)]) == 143
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert out.exists() == (where == "measure")
    assert not (out / "checkpoints").exists()
    assert (
        train.main(
            [*flags, "--out", str(out)]
            if where == "load_corpus"
            else ["--resume", "--out", str(out)]
        )
        == 0
    )
    require_same(whole, out)


def test_a_second_signal_ends_at_once_and_harms_nothing(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saved = tmp_path / "run", hf.save_file

    def interrupted(*args: Any) -> None:
        saved(*args)
        if (out / "checkpoints" / "3.tmp").exists():
            send_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        call_before("train_step", 3, lambda: send_signal(signal.SIGTERM), patch)
        patch.setattr(hf, "save_file", interrupted)
        assert train.main([*flags, "--out", str(out)]) == 130
    assert step_folders.newest(out).name == "2"
    assert not left_over(out)
    require_readable(out)
    assert resume(out) == 0
    require_same(whole, out)


def test_an_ignored_signal_stays_ignored_and_other_threads_are_left_alone(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:  # as `nohup` and `&` start a process
        call_before("train_step", 2, lambda: send_signal(signal.SIGINT), monkeypatch)
        assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    require_same(whole, tmp_path / "one")
    codes: list[int] = []
    argv = [*flags, "--out", str(tmp_path / "other")]
    thread = threading.Thread(target=lambda: codes.append(train.main(argv)))
    thread.start()
    thread.join()
    assert codes == [0]
