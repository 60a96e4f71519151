"""Runs on several processes equal those on one; restarts, signals and refusals of jobs."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_common.errors import InputError
from llama_torch import export, train
from llama_torch.checkpoint.file_names import MODEL_FILE
from llama_torch.checkpoint.shards import StateShards
from llama_torch.checkpoint.step_folders import newest
from llama_torch.distributed import job as job_module
from llama_torch.distributed.parallel import Parallel
from llama_torch.model.config import ModelConfig
from llama_torch.model.llama import Llama
from llama_torch.training import run_dir, shard_saver
from llama_torch.training.saver import make_saver
from llama_torch.training.signals import Stopped, signals

from ..support import state_files
from ..support.jobs import Command, Job, launch_command, torchrun_command
from ..support.trainer_runs import TEXT, scalars

RUN = [
    *("--dim", "16", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2", "--seed", "3"),
    *("--max-seq-len", "16", "--batch-size", "4", "--steps", "6", "--warmup-steps", "2"),
    *("--log-every", "1", "--eval-every", "3", "--eval-batches", "3", "--sample-every", "3"),
    *("--save-every", "2", "--keep-last", "9", "--device", "cpu", "--dtype", "float32"),
    *("--lr", "1e-3"),
]
RESTARTS = ["--max-restarts", "1"]
SIGNALLED = "parity_tests.workers.signalled_trainer"
# Six float32 steps whose sums are taken in another order. Measured: 2e-7.
ROUNDING = 2e-5


def flags_of(folder: Path) -> list[str]:
    """Return the flags of the run, whose text is written into ``folder``."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    return [*RUN, "--data", str(path), "--cache-dir", str(folder / "cache")]


def sharded_run(folder: Path) -> Command:
    flags = [*flags_of(folder), "--fsdp", "2", "--out", folder / "run"]
    return launch_command(2, "llama_torch.train", *flags)


def run_that_loses_a_process(folder: Path) -> Command:
    """Return a job without --out, whose run directory is runs/1."""
    killed = int(signal.SIGKILL), 4, *flags_of(folder), "--fsdp", "2"
    return torchrun_command(2, SIGNALLED, *killed, more=RESTARTS, forks=True)


def run_that_is_stopped(folder: Path) -> Command:
    flags = [*flags_of(folder), "--verify-every", "2", "--out", folder / "run"]
    return torchrun_command(2, SIGNALLED, int(signal.SIGTERM), 3, *flags)


def run_that_is_refused(folder: Path) -> Command:
    flags = [*flags_of(folder), "--tp", "4", "--out", folder / "run"]
    return torchrun_command(2, "llama_torch.train", *flags, more=RESTARTS, forks=True)


SHARDED = Job(sharded_run)
LOSES_A_PROCESS = Job(run_that_loses_a_process, in_folder=True)
STOPPED = Job(run_that_is_stopped)
REFUSED = Job(run_that_is_refused)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return flags_of(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def shards() -> Path:
    """Return the directory of the same run on two processes, each with half of the model."""
    done = SHARDED.done()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 4  # one process speaks, and tells the end
    return SHARDED.folder / "run"


def require_same_run(found: Path, expected: Path, first: int = 1) -> None:
    mine, theirs = scalars(found), scalars(expected)
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        values, steps = ({n: x for n, x in run[tag] if n >= first} for run in (mine, theirs))
        assert values == pytest.approx(steps, rel=ROUNDING)
    weights, others = load_file(found / MODEL_FILE), load_file(expected / MODEL_FILE)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (weight - others[name]).norm() <= ROUNDING * others[name].norm(), name


def require_announced(code: int, error: str) -> None:
    """Require that torchrun's traceback is announced, once, before it comes."""
    said = f"note: exit code {code}, which torchrun reports with a traceback of its own: expect it"
    assert error.partition("ChildFailedError")[0].count(said) == error.count(said) == 1


def back_to(step: int, run: Path, out: Path) -> Path:
    """Copy a run without the checkpoints after ``step``, as the README says."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(MODEL_FILE, "tensorboard", "best"))
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return out


def test_shards_train_as_one(alone: Path, shards: Path) -> None:
    require_same_run(shards, alone)
    assert not list(newest(shards).glob("*.safetensors"))


def test_one_process_goes_on_where_two_stopped(alone: Path, shards: Path, tmp_path: Path) -> None:
    out = back_to(4, shards, tmp_path / "run")
    assert train.main(["--resume", "--out", str(out)]) == 0
    require_same_run(out, alone, first=5)


def test_two_go_on_where_one_stopped(alone: Path, tmp_path: Path) -> None:
    out = back_to(4, alone, tmp_path / "run")
    resumed = "--resume", "--out", out, "--tp", "2"
    done = Job(lambda _: launch_command(2, "llama_torch.train", *resumed)).done()
    assert done.returncode == 0, done.stderr
    require_same_run(out, alone, first=5)
    assert not list(out.rglob("*.tmp"))


def test_shards_are_gathered(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert export.main([str(shards), "--step", "6", "--to", str(tmp_path / "model")]) == 0
    weights, others = load_file(tmp_path / "model" / MODEL_FILE), load_file(shards / MODEL_FILE)
    assert all(torch.equal(weights[name], others[name]) for name in others | weights)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert export.main([str(shards), "--step", "5"]) == 2
    assert "no such checkpoint; there are: 2, 4, 6" in capsys.readouterr().err
    assert export.main([str(tmp_path)]) == 2
    assert "holds no run; name the directory of one" in capsys.readouterr().err


def test_a_process_that_dies_ends_the_job_and_a_restart_resumes_it(alone: Path) -> None:
    done = LOSES_A_PROCESS.done()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("another process of this job ended") == 1
    assert "continuing after step 2" in done.stdout
    require_same_run(LOSES_A_PROCESS.folder / "runs" / "1", alone)


def test_a_restart_leaves_other_runs_alone(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "runs" / "1"
    for out, job in (mine, "one"), (tmp_path / "runs" / "2", "another"):
        out.mkdir(parents=True)
        state_files.write(out / "run.json", state_files.read(alone / "run.json") | {"job": job})
    assert run_dir.flags_after_restart([]) == ["--resume", "--out", str(Path("runs") / "1")]
    named = run_dir.flags_after_restart(["--out", str(mine)])
    assert named[-3:] == ["--resume", "--out", str(mine)]
    for other in (["--out", "runs/2"], ["--out", "new"], ["--resume"]):
        assert run_dir.flags_after_restart(other) == other


def test_a_signal_to_one_process_stops_all_after_the_same_step(alone: Path) -> None:
    done, out = STOPPED.done(), STOPPED.folder / "run"
    assert done.returncode != 0
    assert "stopped by SIGTERM; continue after step 3" in done.stderr
    require_announced(143, done.stderr)
    assert done.stdout.count("verified") == 1
    assert newest(out).name == "3"
    assert train.main(["--resume", "--out", str(out)]) == 0
    require_same_run(out, alone)


def test_a_signal_may_come_twice_to_a_process_of_a_job() -> None:
    """Once from the process group, once from torchrun, which passes it on."""
    with signals(signals_are_duplicated=True) as stop:
        with pytest.raises(Stopped):  # there is no step in hand
            signal.raise_signal(signal.SIGTERM)
        stop.signum, stop.deferred = 0, True
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM


class Lonely(Parallel):
    """The second of two processes; the first one sees step ``first_sees`` in the directory."""

    def __init__(self, first_sees: int) -> None:
        super().__init__()
        self.rank, self.world, self.first_sees = 1, 2, first_sees

    def all_reduce_max(self, number: int) -> int:
        return max(number, self.first_sees if number >= 0 else -self.first_sees)

    def all_reduce_sum(self, *numbers: int) -> list[int]:
        return list(numbers)

    @contextmanager
    def errors_on_main_only(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize(("first_sees", "agrees"), [(6, True), (4, False), (0, False)])
def test_a_directory_that_is_not_shared(first_sees: int, agrees: bool, alone: Path) -> None:
    """As on another machine's disk, or by an outdated listing."""
    with nullcontext() if agrees else pytest.raises(InputError, match="not every process sees"):
        run_dir.require_shared(alone, Lonely(first_sees))


class SlowDisk:
    """An AsyncShardWrite that ends when ``done`` is set or it is waited for."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], group: object) -> None:
        self.folder, self.done = folder, False

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        (self.folder / "shard").write_text("all of it")


def test_a_checkpoint_is_there_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the state is written while training continues."""
    monkeypatch.setattr(shard_saver, "AsyncShardWrite", SlowDisk)
    monkeypatch.setattr(Parallel, "is_sharded", True)
    monkeypatch.setattr(Parallel, "control_group", lambda self: None)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    model = Llama(ModelConfig(dim=8, n_heads=2, n_kv_heads=1, n_layers=1))
    it = make_saver(tmp_path, model, torch.optim.AdamW(model.parameters()), Parallel())
    assert it.save(2, [], wait=False) == []
    assert it.completed() == []
    assert newest(tmp_path) is None
    it.pending[1].done = True
    assert it.completed() == [2]
    assert newest(tmp_path).name == "2"
    assert it.save(4, [], wait=False) == []
    assert it.save(6, [3], wait=True) == [4, 6]
    assert [folder.name for folder in sorted((tmp_path / "checkpoints").iterdir())] == ["4", "6"]
    assert StateShards(newest(tmp_path)).metadata() == (6, [3])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tp", "3"], "--tp 3: 2 processes cannot be shared out so"),
        (["--fsdp", "2", "--tp", "2"], "--fsdp 2: --tp 2 leaves 1 of 2 processes"),
        (["--tp", "2", "--n-kv-heads", "1"], "--tp 2 does not divide --n-kv-heads 1"),
        (["--batch-size", "3"], "is 3, which 2 processes cannot share equally"),
        (["--dry-run"], "--dry-run measures one process"),
        (["--verify-every", "2", "--fsdp", "2"], "--verify-every compares whole models"),
    ],
)
def test_what_cannot_be_shared_out(
    more: list[str],
    message: str,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Checked on the first of two processes, before any collective call."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(job_module, "job", nullcontext)
    assert train.main([*flags, *more]) == 2
    assert message in capsys.readouterr().err


def test_one_process_of_a_job_says_what_is_wrong() -> None:
    """The other processes end with it."""
    done = REFUSED.done()
    assert done.returncode != 0
    assert done.stderr.count("error: --tp 4: 2 processes") == 2  # in each attempt
    assert (
        done.stderr.count("note: exit code 2, after which torchrun starts the job again, unless")
        == 1
    )
    require_announced(2, done.stderr)
    torchruns = 'Traceback (most recent call last):\n  File "<frozen'
    assert "Traceback" not in done.stderr.replace(torchruns, "")
    assert not (REFUSED.folder / "run").exists()
