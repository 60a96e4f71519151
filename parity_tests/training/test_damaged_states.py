"""Checkpoints whose numbers no run saves: resuming and exporting end in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_torch import export, train
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.hf import read_metadata
from llama_torch.checkpoint.single_file import SingleFile
from llama_torch.checkpoint.training_state import load_state

from ..support.checkpoints import to_shards
from ..support.survival import STEPS, require_same, resume
from ..support.trainer_runs import state_file

NAME = "model.norm.weight"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of a run that has a step left to do."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    return out


def both_refuse(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Resume and export; return the lines that each of them ends with."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lines = []
    to = run.parent / "to"
    for command in (
        lambda: train.main(["--resume", "--out", str(run)]),
        lambda: export.main([str(run), "--to", str(to)]),
    ):
        capsys.readouterr()
        assert command() == 2
        lines.append(capsys.readouterr().err)
        assert lines[-1].startswith("error: ")
        assert lines[-1].count("\n") == 1
    assert not to.exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return lines


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (f"parameter.{NAME}", torch.nan, "which is not finite, is damaged; copy it back"),
        (f"parameter.{NAME}", -torch.inf, "which is not finite, is damaged; copy it back"),
        (f"exp_avg.{NAME}", torch.inf, "which is not finite, is damaged; copy it back"),
        (f"exp_avg_sq.{NAME}", -1e-6, "a mean of squares that is negative, is damaged"),
    ],
)
def test_numbers_that_no_run_saves(
    in_shards: bool,
    tensor: str,
    value: float,
    message: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = step_folders.newest(run)
    state = load_state(folder)
    state.tensors[tensor].view(-1)[1] = value
    if in_shards:
        to_shards(folder, state)
    else:
        SingleFile(folder).write(state)
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{folder}" in said
    assert f"{tensor}, {message}" in said
    assert "; or start a new run with another --out\n" in said
    exported = export.main([str(run), "--to", str(run.parent / "to")])
    # A model's directory holds the parameters alone.
    assert exported == (2 if tensor.startswith("parameter") else 0)
    assert (f"{tensor}, {message}" in capsys.readouterr().err) == (exported == 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "4"}, "is not as it was written"),
        ({"skipped": "[1]"}, "is not as it was written"),
        ({"step": "4", "sha256": None}, "is of step 4; rename it"),
        ({"step": "2", "skipped": "[1, 2, 3, 4, 5, 6]", "sha256": None}, "skipped holds 3"),
        ({"skipped": "[1, 1]", "sha256": None}, "skipped holds 1, after 1"),
        ({"skipped": "[0]", "sha256": None}, "skipped holds 0"),
        ({"skipped": "{}", "sha256": None}, "skipped is a dict"),
        ({"step": "9" * 30, "sha256": None}, "names no step"),
    ],
)
def test_steps_that_no_run_saves(
    changes: dict[str, str | None],
    message: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = state_file(run)
    metadata = {k: v for k, v in (read_metadata(path) | changes).items() if v is not None}
    save_file(load_file(path), path, metadata)
    for line in both_refuse(run, capsys):
        assert str(path.parent) in line
        assert message in line


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(whole: Path, run: Path) -> None:
    """It has no checksum."""
    path = state_file(run)
    save_file(load_file(path), path, {"step": str(STEPS - 1), "skipped": "[]"})
    best = run / "best" / "model.safetensors"
    metadata = read_metadata(best)
    del metadata["sha256"]
    save_file(load_file(best), best, metadata)
    assert resume(run) == 0
    newest = step_folders.newest(run) / path.name
    assert read_metadata(newest) == read_metadata(state_file(whole))
    mine, theirs = load_file(newest), load_file(state_file(whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_shards_of_an_earlier_version_are_gone_on_with(whole: Path, run: Path) -> None:
    folder = step_folders.newest(run)
    to_shards(folder)
    content = json.loads((folder / "state.json").read_text())
    del content["sha256"]
    (folder / "state.json").write_text(json.dumps(content))
    assert resume(run) == 0
    require_same(whole, run)


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_one_bit_of_a_tensor(
    in_shards: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number that a run could have saved, and did not."""
    folder = step_folders.newest(run)
    number = load_state(folder).tensors[f"parameter.{NAME}"].numpy().tobytes()
    if in_shards:
        to_shards(folder)
    [path] = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".distcp")]
    content = bytearray(path.read_bytes())
    at = content.index(number)
    content[at] ^= 1
    path.write_bytes(content)
    for line in both_refuse(run, capsys):
        assert str(folder) in line
        assert "is damaged: Bad CRC-32" in line if in_shards else "is not as it was" in line
