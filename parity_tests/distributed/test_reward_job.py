"""A reward model on two processes is that of one: a step's pairs are counted in all."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama_torch import reward
from llama_torch.checkpoint.file_names import MODEL_FILE

from ..support.jobs import Command, Job, launch_command
from ..support.model_directories import write_model
from ..support.pairs import sums, write_pairs
from ..support.trainer_runs import scalars

RUN = [
    *("--max-seq-len", "64", "--batch-size", "2", "--grad-accum", "3", "--lr", "1e-3"),
    *("--save-every", "9", "--device", "cpu", "--dtype", "float32"),
]
ROUNDING = 2e-5  # a few float32 steps whose sums are taken in another order
LAYOUTS = {"replicas": [], "shards": ["--fsdp", "2"]}


def flags_of(folder: Path, name: str = "run") -> list[str]:
    """Write an odd number of pairs; return the flags of a run on them."""
    data = write_pairs(folder / "sums.jsonl", sums(20))
    return [*RUN, "--data", data, "--init-from", str(folder / "model"), "--out", str(folder / name)]


def make_job(layout: list[str]) -> Job:
    def make(folder: Path) -> Command:
        write_model(folder / "model", "bytes")
        return launch_command(2, "llama_torch.reward", *flags_of(folder), *layout)

    return Job(make)


JOBS = {name: make_job(layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_learn_what_one_does(name: str) -> None:
    done, folder = JOBS[name].done(), JOBS[name].folder
    assert done.returncode == 0, done.stderr
    assert reward.main(flags_of(folder, "alone")) == 0
    mine, theirs = folder / "run", folder / "alone"
    first, second = scalars(mine), scalars(theirs)
    for tag in ("train/loss", "train/grad_norm", "train/accuracy", "train/gap", "val/loss"):
        assert len(second[tag]) > 1
        assert dict(first[tag]) == pytest.approx(dict(second[tag]), rel=ROUNDING, abs=1e-6)
    weights, others = load_file(mine / MODEL_FILE), load_file(theirs / MODEL_FILE)
    assert "score.weight" in others
    for key, weight in weights.items():
        assert (weight - others[key]).norm() <= ROUNDING * others[key].norm(), key
