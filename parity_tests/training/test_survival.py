"""Accidents: kills, signals, full disks, bad steps, two trainers, a clock that jumps."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.data import get_worker_info

from llama_torch import generate, train
from llama_torch.checkpoint import hf, step_folders
from llama_torch.checkpoint.hf import read_notes
from llama_torch.checkpoint.training_state import STATE_FILE, load_state
from llama_torch.common import files as checkpoint
from llama_torch.common.errors import InputError
from llama_torch.data import corpus, loader
from llama_torch.training import bad_steps, batch, loop, run_dir, setup, step, throughput, validate

from ..support.jobs import Command, Job
from ..support.trainer_runs import TEXT, refused, scalars
from ..workers.killed_trainer import require_readable

ROOT = Path(__file__).parent.parent.parent
STEPS = 6
SHAPE = [
    *("--dim", "4", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1"),
    *("--hidden-dim", "8", "--max-seq-len", "16", "--batch-size", "2", "--device", "cpu"),
    *("--warmup-steps", "2", "--log-every", "1", "--eval-every", "2", "--eval-batches", "1"),
    *("--sample-every", "0", "--dtype", "float32"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def flags(text: str) -> list[str]:
    return [*SHAPE, "--data", text, "--steps", str(STEPS), "--save-every", "1"]


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A shell's background jobs, and what they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "peak_flops", lambda *_: 1e9)
        patch.setenv("XDG_CACHE_HOME", str(out.parent))
        assert train.main([*flags, "--out", str(out)]) == 0
    return out


def resume(out: Path, *more: str) -> int:
    return train.main(["--resume", "--out", str(out), *more])


def require_same(one: Path, other: Path) -> None:
    """Two runs' losses at every step, newest checkpoints and exports are the same, to the bit."""
    newest = step_folders.newest(one).relative_to(one)
    assert step_folders.newest(other) == other / newest
    for name in (newest / STATE_FILE, Path("model.safetensors"), Path("best/model.safetensors")):
        assert read_notes(one / name) == read_notes(other / name)
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    first, second = scalars(one), scalars(other)
    for tag in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "train/bad_steps"):
        assert repr(first.get(tag)) == repr(second.get(tag)), tag  # NaN is NaN


def left_over(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if ".tmp" in path.name]


# Killed


def run_that_is_killed(folder: Path) -> Command:
    """And the same one whole, in one process that imports torch once."""
    (folder / "text.txt").write_text(TEXT)
    kills = n_kills()
    rng = random.Random(kills)
    lives: list[dict[str, float]] = [{"touch": rng.randrange(1, 10)}]
    lives += [{"touch": rng.randrange(1, 60)} for _ in range(kills)]
    lives += [{"seconds": rng.uniform(0.01, 0.5)} for _ in range(kills // 4)]
    lives.insert(3, {"longest": 10_000})  # shorter than the export
    lives.insert(6, {"longest": 1_000_000})  # longer than the export, shorter than a checkpoint
    steps = 12 + kills
    plan = {
        "out": str(folder / "killed"),
        "whole": str(folder / "whole"),
        "flags": [*SHAPE, "--data", f"{folder}/text.txt", "--steps", str(steps), "--save-every=1"],
        "lives": lives,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return "-m", "parity_tests.workers.killed_trainer", folder / "plan.json"


KILLED = Job(run_that_is_killed)


def n_kills() -> int:
    return min(200, 2 * settings.default.max_examples // 7)


def test_a_run_killed_over_and_over_is_the_uninterrupted_one() -> None:
    done = KILLED.done()
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > n_kills() // 2
    assert "Traceback" not in done.stderr
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "] * 2
    require_same(KILLED.folder / "whole", KILLED.folder / "killed")


# Signals


def before(name: str, call: int, do: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Let the ``call``-th call (from 1) of a function that training calls be preceded by ``do``."""
    owner = next(module for module in (loop, setup, validate) if hasattr(module, name))
    real, count = getattr(owner, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(count) == call:
            do()
        return real(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


def send(number: int) -> None:
    for child in multiprocessing.active_children():  # a terminal's Ctrl-C goes to all
        os.kill(child.pid, number)
    os.kill(os.getpid(), number)


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
        before("train_step", 3, lambda: send(number), patch)
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
        send(signal.SIGINT)
        sent.touch()
        yield from windows

    with monkeypatch.context() as patch:
        patch.setattr(loader.Windows, "__getitem__", waits)
        patch.setattr(setup, "train_batches", lambda *a, **k: interrupted(batches(*a, **k)))
        assert train.main([*flags, "--num-workers", "1", "--out", str(out)]) == 130
    assert step_folders.newest(out).name == "3"
    assert resume(out, "--num-workers", "0") == 0
    require_same(whole, out)


def test_a_signal_in_the_last_step_finishes_the_run(
    flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before("train_step", STEPS, lambda: send(signal.SIGTERM), monkeypatch)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    require_same(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("load_corpus", "before the run began; nothing was written\n"),
        (
            "validation_loss",
            "continue at the last checkpoint with: python -m llama_torch.train --resume",
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
        before(where, 1, lambda: send(signal.SIGTERM), patch)
        assert train.main([*flags, "--out", str(out)]) == 143
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert out.exists() == (where == "validation_loss")
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
            send(signal.SIGINT)

    with monkeypatch.context() as patch:
        before("train_step", 3, lambda: send(signal.SIGTERM), patch)
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
        before("train_step", 2, lambda: send(signal.SIGINT), monkeypatch)
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
            assert folder == step_folders.temporary(out / "checkpoints" / str(step_))
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
    step_folders.sweep(tmp_path)
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


def test_the_best_model_is_kept_and_outlives_a_resume(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, losses = tmp_path / "run", {0: 1.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.0, 10: math.nan}
    done: list[int] = []
    monkeypatch.setattr(validate, "validation_loss", lambda *_: losses[done[-1] if done else 0])
    real = step.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        done.append(done[-1] + 1 if done else 1)
        if done[-1] == 5:
            send(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)
    more = ["--steps", "10", "--save-every", "2", "--keep-last", "1"]
    assert train.main([*flags, *more, "--out", str(out)]) == 143
    losses[5] = 1.0  # what a resumption measures first is no candidate
    assert resume(out) == 0
    notes = read_notes(out / "best" / "model.safetensors")
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
    """Return a function whose ``call``-th call and all later ones find the disk full."""
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


# Bad steps


def spoil(kinds: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let these steps (from 1, by their windows) have a bad loss or gradient."""
    real = step.accumulate

    def accumulate(*given: Any) -> Any:
        loss, grads = real(*given)
        kind = kinds.get(train_step.step, "")
        if kind == "gradient":
            next(iter(grads.values())).view(-1)[0] = math.inf
        return torch.full_like(loss, float(kind)) if kind not in ("", "gradient") else loss, grads

    def train_step(*args: Any, accept: Any, **kwargs: Any) -> Any:
        (train_step.step,) = accept.args
        return step.train_step(*args, accept=accept, **kwargs)

    monkeypatch.setattr(step, "accumulate", accumulate)
    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("nan", "its loss is nan (at most 32.47 is sane)"),
        ("inf", "its loss is inf"),
        ("32.5", "its loss is 32.5 "),
        ("gradient", "its gradient norm inf"),
    ],
)
def test_a_bad_step_ends_the_run_before_its_update(
    kind: str,
    named: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, models = tmp_path / "run", []
    spoil({3: kind}, monkeypatch)
    monkeypatch.setattr(
        setup, "build", lambda *a, real=setup.build: models.append(real(*a)) or models[-1]
    )
    assert train.main([*flags, "--log-every", "100", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "error: step 3 is bad" in error
    assert named in error
    assert "training tokens " in error
    assert "(the last checkpoint stands)" in error
    saved = load_state(step_folders.newest(out))
    assert saved[1:] == (2, [])
    for name, parameter in models[0][0].named_parameters():
        assert torch.equal(parameter, saved[0][f"parameter.{name}"])


def test_the_windows_of_a_bad_step_are_those_it_read(
    flags: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[torch.Tensor] = []
    cut = batch.to_batch
    monkeypatch.setattr(setup, "to_batch", lambda part: read.append(part) or cut(part))
    spoil({4: "nan"}, monkeypatch)
    corpora = []
    load = corpus.load_corpus
    monkeypatch.setattr(setup, "load_corpus", lambda *a: corpora.append(load(*a)) or corpora[-1])
    assert train.main([*flags, "--grad-accum", "2", "--out", str(tmp_path / "run")]) == 2
    spans = capsys.readouterr().err.partition("training tokens ")[2].partition(";")[0]
    ends = [map(int, span.split("-")) for span in spans.split(", ")]
    (source,) = corpora[0].sources
    named = [torch.from_numpy(source.train[a : b + 1].astype("int64")) for a, b in ends]
    assert torch.equal(torch.stack(named), torch.cat(read[-2:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_skipped_steps_change_nothing_and_are_remembered(
    dtype: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = [*flags, "--keep-last", "9", "--skip-bad-steps", "--dtype", dtype]
    spoil({1: "nan", 3: "gradient", 5: "40"}, monkeypatch)
    assert train.main([*flags, "--out", str(whole)]) == 0
    assert "3 bad steps skipped: 1, 3, 5\n" in capsys.readouterr().out
    assert scalars(whole)["train/bad_steps"] == [(1, 1.0), (3, 2.0), (5, 3.0)]
    states = {n: load_state(whole / "checkpoints" / str(n)) for n in range(1, STEPS + 1)}
    assert states[STEPS][2] == [1, 3, 5]
    for skipped, previous in ((3, 2), (5, 4)):
        one, other = states[skipped][0], states[previous][0]
        assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = states[2][0], states[4][0]
    assert not all(torch.equal(one[name], other[name]) for name in one)
    for stop_at in (1, 3, 4):
        with monkeypatch.context() as patch:
            before("train_step", stop_at, lambda: send(signal.SIGINT), patch)
            assert train.main([*flags, "--out", str(parted)]) == 130
        assert resume(parted) == 0
        require_same(whole, parted)
        shutil.rmtree(parted)


def test_a_run_that_stopped_at_a_bad_step_continues_over_it(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    spoil({3: "nan"}, monkeypatch)
    assert train.main([*flags, "--skip-bad-steps", "--out", str(whole)]) == 0
    assert train.main([*flags, "--out", str(parted)]) == 2
    assert resume(parted) == 2
    assert resume(parted, "--skip-bad-steps") == 0
    require_same(whole, parted)
    spoil(dict.fromkeys(range(2, 20), "nan"), monkeypatch)
    more = ["--steps", "20", "--skip-bad-steps", "--out", str(tmp_path / "other")]
    assert train.main([*flags, *more]) == 2
    assert "10 bad steps in a row, the last of them step 11" in capsys.readouterr().err


numbers = st.floats() | st.floats(0, 50) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    steps=st.lists(st.tuples(numbers, numbers), max_size=6),
    vocab_size=st.integers(1, 100_000),
    z_loss=st.sampled_from([0.0, 1e-4]),
)
def test_a_gpus_guard_finds_the_first_bad_step(
    steps: list[tuple[float, float]], vocab_size: int, z_loss: float
) -> None:
    """On a device that is not waited for; the same judgement as where it is."""
    largest, cpu = bad_steps.largest_loss(vocab_size, z_loss), torch.device("cpu")
    later, at_once = (
        bad_steps.BadSteps(largest, cpu, lambda i: f"windows {i}", []) for _ in range(2)
    )
    later.waits = False
    most = 3 * math.log(vocab_size)
    most += z_loss * most**2
    bad = 0
    for number, (loss, norm) in enumerate(steps, 1):
        good = math.isfinite(loss) and math.isfinite(norm) and loss <= most
        tensors = torch.tensor(loss, dtype=torch.float64), torch.tensor(norm)
        # A norm above float32's largest is infinite.
        good = good and bool(tensors[1].isfinite())
        assert later.accept(number, *tensors)
        if good:
            assert at_once.accept(number, *tensors)
        else:
            with pytest.raises(InputError, match=f"step {number} is bad"):
                at_once.accept(number, *tensors)
            bad = bad or number
    at_once.look()
    if bad:
        with pytest.raises(InputError, match=f"step {bad} is bad.*windows {bad - 1}"):
            later.look()
    else:
        later.look()


def test_what_a_gpu_trained_after_a_bad_step_is_not_saved(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = bad_steps.BadSteps.__init__

    def unwaited(self: bad_steps.BadSteps, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self.waits = False

    monkeypatch.setattr(bad_steps.BadSteps, "__init__", unwaited)
    spoil({3: "gradient"}, monkeypatch)
    often = {"log": "100", "eval": "100", "save": "2"}
    for name in often:
        out = tmp_path / name
        every = [f"--{key}-every={'5' if key == name != 'save' else often[key]}" for key in often]
        assert train.main([*flags, *every, "--out", str(out)]) == 2
        assert "step 3 is bad: its loss is 10.8" in capsys.readouterr().err
        assert step_folders.newest(out).name == "2"
        require_readable(out)


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
    """The other one starts and claims runs/1 while this one is being prepared."""
    monkeypatch.chdir(tmp_path)
    other = run_dir.lock(Path("runs/1"))
    with monkeypatch.context() as patch:
        start = (lambda: train.main(flags)) if first_ends else other.__enter__
        before("build", 1, start, patch)
        assert train.main(flags) == 2
    message = "already holds a run; add --resume" if first_ends else "is in use by another trainer"
    assert f"error: --out runs/1 {message}" in capsys.readouterr().err
    if not first_ends:
        assert os.listdir("runs/1") == ["lock"]
        other.__exit__(None, None, None)
    assert train.main(flags) == 0
    assert os.path.isfile("runs/2/run.json")


def test_a_lock_is_not_held_by_what_a_trainer_leaves_behind(tmp_path: Path) -> None:
    """Data workers, which are forked, live on for seconds after their trainer was killed."""
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
    """Let the time of day go back a year, and forth and back again, at every look at it."""
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
            before("train_step", stop_at, lambda: send(signal.SIGTERM), patch)
            argv = ["--resume"] if Path("runs").exists() else flags
            assert train.main(argv) == 143
    os.utime("runs/1/checkpoints/5", (0, 0))
    assert train.main(["--resume"]) == 0
    out = Path("runs/1")
    require_same(whole, out)
    assert all(value > 0 for _, value in scalars(out)["train/tokens_per_second"])
    assert run_dir.resolve_config(flags).out == "runs/2"
