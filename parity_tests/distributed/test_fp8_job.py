"""Runs in fp8 on two processes, with replicas and with shards, go as on one."""

from pathlib import Path

import pytest

from llama_torch import train

from ..support.jobs import Command, Job, launch_command
from ..support.trainer_runs import TEXT, scalars

RUN = [
    *("--dim", "32", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2", "--seed", "3"),
    *("--hidden-dim", "48", "--max-seq-len", "16", "--batch-size", "4", "--steps", "4"),
    *("--warmup-steps", "2", "--log-every", "1", "--eval-every", "2", "--eval-batches", "2"),
    *("--sample-every", "0", "--device", "cpu", "--dtype", "float32", "--lr", "1e-3"),
    *("--precision", "fp8"),
]
LAYOUTS = {"shards": ["--fsdp", "2"], "replicas": []}
# Four steps whose float32 sums are taken in another order. Measured: 1e-7.
ROUNDING = 2e-5


def flags_of(folder: Path, name: str) -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    data = ["--data", str(folder / "text.txt"), "--cache-dir", str(folder / "cache")]
    return [*RUN, *data, "--out", str(folder / name)]


def make_job(name: str) -> Job:
    def make(folder: Path) -> Command:
        return launch_command(2, "llama_torch.train", *flags_of(folder, "run"), *LAYOUTS[name])

    return Job(make)


JOBS = {name: make_job(name) for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_as_one(name: str) -> None:
    """The scale of activations is that of a process's own micro-batch, and adds no rounding."""
    done, folder = JOBS[name].done(), JOBS[name].folder
    assert done.returncode == 0, done.stderr
    assert "block products in fp8" in done.stdout
    assert train.main(flags_of(folder, "alone")) == 0
    assert train.main([*flags_of(folder, "own"), "--precision", "dtype"]) == 0
    mine, alone, own = (scalars(folder / run) for run in ("run", "alone", "own"))
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert dict(mine[tag]) == pytest.approx(dict(alone[tag]), rel=ROUNDING)
    norms, others = (dict(run["train/grad_norm"]) for run in (mine, own))
    assert all(norms[at] != pytest.approx(others[at], rel=10 * ROUNDING) for at in norms)
