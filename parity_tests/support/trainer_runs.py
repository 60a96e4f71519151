"""Run the trainer's command on a small model, and read its logs and checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_torch import train
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.training import loop, step

SMALL_RUN = [
    *("--dim", "8", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1"),
    *("--max-seq-len", "16", "--batch-size", "2", "--steps", "6", "--warmup-steps", "2"),
    *("--log-every", "1", "--eval-every", "3", "--eval-batches", "1", "--sample-every", "3"),
    *("--save-every", "2", "--device", "cpu", "--dtype", "float32"),
]

TEXT = "A llama walks over the hill and the hill walks under it. " * 60


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def state_file(out: Path) -> Path:
    """Return the path of the newest checkpoint's file, which may not exist."""
    return (step_folders.newest(out) or out / "none") / STATE_FILE


class Stopped(KeyboardInterrupt):
    """The interrupt of Ctrl-C, raised at a chosen step."""


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = step.train_step, iter(range(steps))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(taken, None) is None:
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)


def refused_line(
    main: Callable[[Sequence[str]], int], argv: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the one line, but for notes, with which a command is refused."""
    capsys.readouterr()
    assert main(argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    return said[0]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def unsampled_run(folder: Path) -> list[str]:
    """Return the flags of a run that prints no samples, whose text is written into ``folder``."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    return [*SMALL_RUN, "--sample-every", "0", "--data", str(path)]
