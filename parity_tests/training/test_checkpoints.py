"""Checkpoints that are damaged, incomplete, or cannot be written."""

import errno
import itertools
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.summary.writer.record_writer import RecordWriter

from llama_common import files as checkpoint
from llama_common.errors import InputError
from llama_torch import generate, train
from llama_torch.checkpoint import hf, step_folders
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.checkpoint.hf import read_metadata
from llama_torch.training import loop, restore, step, validate
from llama_torch.training.objective import Measured

from ..support.survival import STEPS, left_over, require_same, resume, send_signal
from ..support.trainer_runs import refused
from ..workers.killed_trainer import require_readable

# Checkpoints


@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=6).map(itertools.accumulate).map(list),
    keep=st.integers(1, 4),
    failing=st.sets(st.integers(0, 5)),
)
def test_a_commit_is_complete_or_absent(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, failing: set[int]
) -> None:
    out, there = tmp_path_factory.mktemp("run"), list[int]()
    for number, step_ in enumerate(steps):
        fails = number in failing

        def write(folder: Path, step_: int = step_, fails: bool = fails) -> None:
            assert folder == step_folders.temporary_path(out / "checkpoints" / str(step_))
            (folder / "nested").mkdir()
            (folder / "nested" / "file").write_text(str(step_))
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if fails:
            with pytest.raises(InputError, match=f"{step_}: cannot be written.*No space left"):
                step_folders.commit(out, step_, write, keep)
        else:
            made = step_folders.commit(out, step_, write, keep)
            assert (made / "nested" / "file").read_text() == str(step_)
            there = [*there, step_][-keep:]
        assert {path.name for path in (out / "checkpoints").iterdir()} == set(map(str, there))
        newest = step_folders.newest(out)
        assert newest == (out / "checkpoints" / str(there[-1]) if there else None)
    if len(there) > 1:
        assert step_folders.newest(out, before=there[-1]).name == str(there[-2])


def test_no_file_of_another_is_swept(tmp_path: Path) -> None:
    for name in ("mine.tmp", "model.tmp", "sub/mine.tmp", "checkpoints/7.tmp", "best.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    step_folders.remove_temporary(tmp_path)
    assert {path.name for path in left_over(tmp_path)} == {"mine.tmp", "model.tmp"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(
    flags: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    newest = out / "checkpoints" / str(STEPS)
    os.truncate(newest / STATE_FILE, (newest / STATE_FILE).stat().st_size - 1)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refused(["--resume", "--out", str(out)], capsys)
    assert f"{newest / STATE_FILE}: not a complete safetensors file" in message
    assert f"delete {newest} to continue from step {STEPS - 1}" in message
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(newest)
    assert resume(out) == 0
    require_same(whole, out)
    shutil.rmtree(out / "checkpoints" / str(STEPS - 1))
    newest.rename(newest.with_name("9"))
    assert "is of step 6" in refused(["--resume", "--out", str(out)], capsys)
    os.truncate(out / "checkpoints" / "9" / STATE_FILE, 5)
    message = refused(["--resume", "--out", str(out)], capsys)
    assert "start a new run with another --out" in message


def test_a_run_on_one_process_resumes_without_a_second_state(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is checked by shapes; a second state would double the memory."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    monkeypatch.delattr(restore, "state_tensors")
    assert resume(out) == 0
    require_same(whole, out)


def test_the_best_model_is_kept_and_outlives_a_resume(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, losses = tmp_path / "run", {0: 1.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.0, 10: math.nan}
    done: list[int] = []

    def measured(*_: Any) -> Measured:
        return Measured(losses[done[-1] if done else 0], {})

    monkeypatch.setattr(validate, "measure", measured)
    real = step.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        done.append(done[-1] + 1 if done else 1)
        if done[-1] == 5:
            send_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)
    more = ["--steps", "10", "--save-every", "2", "--keep-last", "1"]
    assert train.main([*flags, *more, "--out", str(out)]) == 143
    losses[5] = 1.0  # what a resumption measures first is no candidate
    assert resume(out) == 0
    notes = read_metadata(out / "best" / "model.safetensors")
    assert (notes["step"], notes["val_loss"]) == ("4", "4.0")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["10"]
    newest, best = load_file(out / "model.safetensors"), load_file(out / "best/model.safetensors")
    assert not all(torch.equal(newest[name], best[name]) for name in newest)
    capsys.readouterr()
    assert generate.main(["--ckpt", str(out / "best"), "--prompt", "The"]) == 0
    assert capsys.readouterr().out.startswith("The")
    os.truncate(out / "best" / "model.safetensors", 1000)
    assert f"or delete {out / 'best'} to go on" in refused(["--resume", "--out", str(out)], capsys)
    shutil.rmtree(out / "best")
    assert resume(out, "--no-keep-best") == 0
    assert not (out / "best").exists()


# A full disk


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nth(real: Any, call: int) -> Any:
    """Return a function that raises ENOSPC from its ``call``-th call on."""
    count = itertools.count(1)

    def wrapped(*args: Any) -> Any:
        result = real(*args)  # what was written is there, and not all of it
        return full() if next(count) >= call else result

    return wrapped


@pytest.mark.parametrize(
    ("owner", "name", "call", "steps_saved"),
    [
        (checkpoint, "_write_text", 1, None),  # run.json
        (checkpoint, "_write_text", 2, None),  # config.json
        (RecordWriter, "write", 1, None),
        (RecordWriter, "write", 15, 1),
        (hf, "save_file", 1, None),
        (hf, "save_file", 3, 1),  # best/
        (hf, "save_file", 4, 1),  # the checkpoint of step 2
        (hf, "save_file", 5, 2),  # its export
        (os, "fsync", 33, 1),
        (os, "fsync", 41, 2),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(
    owner: Any,
    name: str,
    call: int,
    steps_saved: int | None,
    flags: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    # Where the tokens are kept already: their file would count among those that are written.
    monkeypatch.setenv("XDG_CACHE_HOME", str(whole.parent))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, nth(getattr(owner, name), call))
        assert train.main([*flags, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"{out}" in error
    assert "cannot be written ([Errno 28] No space left on device" in error
    assert error.count("\n") == 1
    assert not left_over(out)
    require_readable(out)
    newest = step_folders.newest(out)
    assert (newest and int(newest.name)) == steps_saved
    again = resume(out) if (out / "run.json").exists() else train.main([*flags, "--out", str(out)])
    assert again == 0
    require_same(whole, out)
