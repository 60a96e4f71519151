"""A run resumes on another number of processes with the nearest layout that fits them."""

import shutil
from pathlib import Path

import pytest

from llama_common.errors import InputError
from llama_torch import train
from llama_torch.config import ParallelConfig
from llama_torch.training import run_dir
from llama_torch.training.parallel_layout import check_parallel_layout, fit_layout

from ..support import state_files
from ..support.jobs import Command, Job, launch_command
from ..support.trainer_runs import TEXT, scalars

RUN = [
    *("--dim", "16", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "4", "--seed", "3"),
    *("--max-seq-len", "16", "--batch-size", "4", "--steps", "4", "--warmup-steps", "2"),
    *("--log-every", "1", "--eval-every", "2", "--eval-batches", "3", "--sample-every", "0"),
    *("--save-every", "2", "--device", "cpu", "--dtype", "float32", "--lr", "1e-3"),
]
ROUNDING = 2e-5  # a few float32 steps whose sums are taken in another order


def flags_of(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    data = ["--data", str(folder / "text.txt"), "--cache-dir", str(folder / "cache")]
    return [*RUN, *data, "--out", str(folder / "run"), *more]


def begin(folder: Path) -> Command:
    return launch_command(4, "llama_torch.train", *flags_of(folder, "--fsdp", "2", "--tp", "2"))


def resumed(job: Job, world: int) -> Job:
    """Return a job that goes on, from step 2, with a copy of another's run."""

    def make(folder: Path) -> Command:
        resume = "--resume", "--out", copied(job, folder)
        return launch_command(world, "llama_torch.train", *resume)

    return Job(make)


def copied(job: Job, folder: Path) -> Path:
    """Copy the run of a job into a folder, without what came after step 2."""
    done = job.done()
    assert done.returncode == 0, done.stderr
    shutil.copytree(job.folder / "run", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "4")
    shutil.rmtree(folder / "run" / "tensorboard")
    return folder / "run"


ON_FOUR = Job(begin)
ON_TWO = resumed(ON_FOUR, 2)
ON_FOUR_AGAIN = resumed(ON_TWO, 4)
NOTE = "note: --resume continues on {} with --fsdp 1 --tp {} instead of --fsdp 2 --tp 2\n"


def test_two_processes_go_on_where_four_stopped() -> None:
    done = ON_TWO.done()
    assert (done.returncode, done.stderr) == (0, NOTE.format("2 processes", 2))
    require_same_steps(ON_TWO.folder / "run", ON_FOUR.folder / "run")


def test_four_processes_go_on_where_two_stopped_with_the_layout_of_before() -> None:
    done = ON_FOUR_AGAIN.done()
    assert (done.returncode, done.stderr) == (0, "")
    require_same_steps(ON_FOUR_AGAIN.folder / "run", ON_FOUR.folder / "run")


def test_one_process_goes_on_where_four_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(ON_FOUR, tmp_path)
    assert train.main(["--resume", "--out", str(run)]) == 0
    assert capsys.readouterr().err == NOTE.format("1 process", 1)
    require_same_steps(run, ON_FOUR.folder / "run")


def require_same_steps(run: Path, whole: Path) -> None:
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        found, expected = dict(scalars(run)[tag]), dict(scalars(whole)[tag])
        assert found == pytest.approx({step: expected[step] for step in found}, rel=ROUNDING)
        assert 4 in found


@pytest.mark.parametrize(
    ("began", "world", "expected"),
    [
        # Fewer, more, none left over.
        ((4, 1), 2, (2, 1)),
        ((4, 1), 1, (1, 1)),
        ((4, 1), 8, (4, 1)),
        ((4, 1), 12, (4, 1)),
        ((1, 1), 7, (1, 1)),
        ((0, 1), 6, (0, 1)),
        ((0, 2), 1, (0, 1)),
        # What does not divide: no process holds more than before, where there are enough.
        ((4, 1), 3, (3, 1)),
        ((4, 1), 5, (5, 1)),
        ((4, 1), 6, (6, 1)),
        ((4, 1), 10, (5, 1)),
        # Tensor parallelism stays where it divides, else shards take its place.
        ((2, 2), 2, (1, 2)),
        ((2, 2), 8, (2, 2)),
        ((4, 2), 4, (2, 2)),
        ((1, 4), 6, (3, 2)),
        ((1, 2), 3, (3, 1)),
        ((2, 2), 1, (1, 1)),
        ((1, 8), 8, (1, 8)),
        ((8, 8), 512, (8, 8)),
    ],
)
def test_the_nearest_layout(
    began: tuple[int, int],
    world: int,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    layout = ParallelConfig(*began)
    assert fit_layout(layout, layout, ()) == ParallelConfig(*expected)


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (2, ["--fsdp", "4"], "--fsdp 4: --tp 1 leaves 2 of 2 processes"),
        (2, ["--tp", "4"], "--tp 4: 2 processes cannot be shared out so"),
        (3, [], "is 4, which 3 processes cannot share equally; start a number that divides it"),
        (2, ["--fsdp", "1"], (1, 1)),
        (4, ["--tp=2"], (2, 2)),
        (4, ["--tp=2", "--fsdp=1"], (1, 2)),
        (2, ["--config", "layout.toml"], (2, 1)),
    ],
)
def test_a_flag_that_is_given_wins_or_is_refused(
    world: int,
    flags: list[str],
    message: str | tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = begun_with(tmp_path, 4, 1)
    (tmp_path / "layout.toml").write_text("[parallel]\nfsdp = 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    config = run_dir.resolve_config(["--resume", "--out", str(out), *flags])
    if isinstance(message, tuple):
        check_parallel_layout(config)
        assert (config.parallel.fsdp, config.parallel.tp) == message
    else:
        with pytest.raises(InputError, match=message):
            check_parallel_layout(config)


def test_a_job_that_is_restarted_on_fewer_machines_fits_its_own_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with torchrun --nnodes 1:2, whose restart has the flags of the beginning."""
    out = begun_with(tmp_path, 4, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = run_dir.resolve_config(["--fsdp", "4", "--resume", "--out", str(out)])
    assert config.parallel == ParallelConfig(2, 1)


def begun_with(folder: Path, fsdp: int, tp: int) -> Path:
    """Return the directory of a run that has begun with a layout, and has no checkpoint."""
    out, settings = folder / "run", {"parallel": {"fsdp": fsdp, "tp": tp}, "batch_size": 4}
    out.mkdir()
    content = {"identity": {}, "settings": settings, "data_key": "", "job": "", "directory": ""}
    state_files.write(out / "run.json", content)
    return out
