"""learning.py: the losses of our training and of a plain transformers loop."""

import json
from pathlib import Path

import pytest

from tools import learning
from tools.benchmarks.learning_runs import Run, show

TINY = ["--device", "cpu", "--dim", "32", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2"]
FEW = ["--max-seq-len", "16", "--batch-size", "2", "--eval-batches", "2"]


def test_both_sides_learn_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32 they differ by rounding; --lr is high enough for the losses to move."""
    out = tmp_path / "losses.json"
    flags = ["--steps", "5", "--log-every", "2", "--seeds", "2", "--lr", "3e-2", "--warmup-steps=1"]
    assert learning.main([*TINY, *FEW, *flags, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "mean" in table
    assert "standard deviation" in table
    runs = json.loads(out.read_text())
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        assert run["steps"] == [2, 4, 5]
        assert run["peer"] == pytest.approx(run["ours"], rel=1e-3)
        assert run["peer_final"] == pytest.approx(run["ours_final"], rel=1e-3)
        assert run["ours"][-1] < run["ours"][0] - 0.1
        assert f"{run['ours_final']:.4f}" in table


def test_one_seed_has_no_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    show([Run(0, [1], [2.0], [2.5], 2.0, 2.5)], "title")
    said = capsys.readouterr().out
    assert "-0.5000" in said
    assert "deviation" not in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seeds", "0"], "--seeds must be positive, got 0"),
        (["--z-loss", "0.1"], "--z-loss must be 0"),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: no file found"),
        (["--out", "/nowhere/losses.json"], "--out /nowhere/losses.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_value_is_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learning.main(flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
