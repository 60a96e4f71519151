"""Fine-tuning on two processes is fine-tuning on one: a step's learnt tokens are counted in all."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama_torch import sft
from llama_torch.checkpoint.file_names import MODEL_FILE

from ..support.jobs import Command, Job, launch_command
from ..support.model_directories import write_model
from ..support.tokenizers import turns
from ..support.trainer_runs import scalars

RUN = [
    *("--max-seq-len", "48", "--batch-size", "2", "--grad-accum", "3", "--lr", "1e-3"),
    *("--sample-every", "2", "--save-every", "9", "--device", "cpu", "--dtype", "float32"),
]
ROUNDING = 2e-5  # a few float32 steps whose sums are taken in another order


def flags_of(folder: Path, name: str = "run") -> list[str]:
    """Write answers of very unequal lengths; return the flags of a run on them."""
    said = [turns([f"Count to {i}", " ".join(map(str, range(1, i + 1)))]) for i in range(1, 16)]
    lines = (json.dumps({"messages": messages}) + "\n" for messages in said)
    (folder / "counts.jsonl").write_text("".join(lines))
    data = ["--data", str(folder / "counts.jsonl"), "--init-from", str(folder / "model")]
    return [*RUN, *data, "--out", str(folder / name)]


def make(folder: Path) -> Command:
    write_model(folder / "model", "bytes")
    return launch_command(2, "llama_torch.sft", *flags_of(folder))


JOB = Job(make)


def test_two_processes_learn_what_one_does() -> None:
    done, folder = JOB.done(), JOB.folder
    assert done.returncode == 0, done.stderr
    assert sft.main(flags_of(folder, "alone")) == 0
    mine, theirs = folder / "run", folder / "alone"
    first, second = scalars(mine), scalars(theirs)
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert len(second[tag]) > 1
        assert dict(first[tag]) == pytest.approx(dict(second[tag]), rel=ROUNDING)
    weights, others = load_file(mine / MODEL_FILE), load_file(theirs / MODEL_FILE)
    for key, weight in weights.items():
        assert (weight - others[key]).norm() <= ROUNDING * others[key].norm(), key
