"""Jobs that begin from a model directory: each process reads its weights, one writes its files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.checkpoint.file_names import MODEL_FILE

from ..support.jobs import Command, Job, launch_command
from ..support.model_directories import write_model
from ..support.trainer_runs import TEXT, scalars

RUN = [
    *("--max-seq-len", "16", "--batch-size", "4", "--steps", "4", "--warmup-steps", "2"),
    *("--log-every", "1", "--eval-every", "2", "--eval-batches", "3", "--sample-every", "2"),
    *("--save-every", "2", "--device", "cpu", "--dtype", "float32", "--lr", "1e-3"),
]
ROUNDING = 2e-5  # a few float32 steps whose sums are taken in another order
LAYOUTS = {
    "shards": ("bytes", torch.bfloat16, 3, ["--fsdp", "2"]),
    "tensor parallelism": ("pieces", torch.float16, 1, ["--tp", "2"]),
    "replicas": ("spaced", torch.float64, 2, []),
}


def make_job(name: str) -> Job:
    kind, dtype, n_files, layout = LAYOUTS[name]

    def make(folder: Path) -> Command:
        write_model(folder / "model", kind, dtype, n_files)
        return launch_command(2, "llama_torch.train", *flags_of(folder), *layout)

    return Job(make)


def flags_of(folder: Path, name: str = "run") -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    data = ["--data", str(folder / "text.txt"), "--cache-dir", str(folder / "cache")]
    return [*RUN, *data, "--init-from", str(folder / "model"), "--out", str(folder / name)]


JOBS = {name: make_job(name) for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_job_begins_as_one_process_does(name: str) -> None:
    done, folder = JOBS[name].done(), JOBS[name].folder
    assert done.returncode == 0, done.stderr
    assert train.main(flags_of(folder, "alone")) == 0
    mine, theirs = folder / "run", folder / "alone"
    first, second = scalars(mine), scalars(theirs)
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert dict(first[tag]) == pytest.approx(dict(second[tag]), rel=ROUNDING)
    weights, others = load_file(mine / MODEL_FILE), load_file(theirs / MODEL_FILE)
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        assert (weight - others[key]).norm() <= ROUNDING * others[key].norm(), key
    around = [path.name for path in theirs.iterdir() if "token" in path.name]
    for file in ("config.json", "generation_config.json", *around):
        assert (mine / file).read_bytes() == (theirs / file).read_bytes()


@pytest.mark.parametrize("name", ["shards", "tensor parallelism"])
def test_one_process_resumes_what_a_job_began_without_the_directory(
    name: str, tmp_path: Path
) -> None:
    job = JOBS[name]
    assert job.done().returncode == 0
    out = tmp_path / "run"
    shutil.copytree(job.folder / "run", out)
    shutil.rmtree(out / "checkpoints" / "4")
    record = json.loads((out / "run.json").read_text())
    for part in ("settings", "identity"):
        record[part]["init_from"] = "/nowhere"
    del record["sha256"]  # as one does to keep a change
    (out / "run.json").write_text(json.dumps(record))
    assert train.main(["--resume", "--out", str(out)]) == 0
    again, before = load_file(out / MODEL_FILE), load_file(job.folder / "run" / MODEL_FILE)
    for key, weight in again.items():
        assert (weight - before[key]).norm() <= ROUNDING * before[key].norm(), key
