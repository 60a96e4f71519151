"""Jobs of two agents of torchrun, as on two hosts; here both are on this machine."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.checkpoint.file_names import MODEL_FILE
from llama_torch.checkpoint.step_folders import newest

from ..support.jobs import Command, Job
from ..support.trainer_runs import TEXT, scalars

RUN = [
    *("--dim", "16", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2", "--seed", "3"),
    *("--max-seq-len", "16", "--batch-size", "4", "--warmup-steps", "2", "--log-every", "1"),
    *("--eval-every", "100000", "--eval-batches", "1", "--sample-every", "0", "--save-every", "4"),
    *("--device", "cpu", "--dtype", "float32", "--lr", "1e-3"),
]
ROUNDING = 2e-5  # a few float32 steps whose sums are taken in another order

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds an agent's process in /proc"
)


def flags_of(folder: Path, steps: int, out: str = "run") -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    data = ["--data", str(folder / "text.txt"), "--cache-dir", str(folder / "cache")]
    return [*RUN, *data, "--steps", str(steps), "--out", str(folder / out)]


def agents(word: str, steps: int) -> Job:
    def make(folder: Path) -> Command:
        worker = "-m", "parity_tests.workers.two_agents", word, "llama_torch.train"
        return *worker, *flags_of(folder, steps), "--fsdp", "2"

    return Job(make)


WHOLE = agents("", 6)
LOSES_ONE = agents("step     4  checkpoint saved", 100_000)


def test_two_agents_train_as_one_process() -> None:
    """As do two processes of one agent, in test_job.py."""
    done, folder = WHOLE.done(), WHOLE.folder
    assert done.returncode == 0, done.stdout
    assert train.main(flags_of(folder, 6, "alone")) == 0
    mine, alone = scalars(folder / "run"), scalars(folder / "alone")
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert dict(mine[tag]) == pytest.approx(dict(alone[tag]), rel=ROUNDING)
    weights, others = (load_file(folder / name / MODEL_FILE) for name in ("run", "alone"))
    for name, weight in weights.items():
        assert (weight - others[name]).norm() <= ROUNDING * others[name].norm(), name


def test_the_job_ends_with_a_machine_and_the_run_goes_on_elsewhere() -> None:
    done, run = LOSES_ONE.done(), LOSES_ONE.folder / "run"
    assert done.returncode == 1
    assert done.stdout.count("error: another process of this job ended") <= 1
    step = int(newest(run).name)
    assert step >= 4
    assert train.main(["--resume", "--out", str(run), "--steps", str(step + 1)]) == 0
