"""scaling.py: rows of several processes beside one's, their losses, and a job that fails."""

import json
from pathlib import Path

import pytest
import torch

from llama_torch.model.config import ModelConfig
from tools import scaling
from tools.benchmarks.scaling import ALONE, Layout, layouts, make_job, make_row, run_job, table
from tools.benchmarks.scaling_config import ScalingConfig
from tools.benchmarks.scaling_side import Job, Result, run
from tools.shapes import SHAPES

SMALL = ModelConfig(32, 2, 2, 2, vocab_size=64, max_seq_len=16)


def small_job(tmp_path: Path, **changes: object) -> Job:
    """Return a job of one process; its timed steps take half of the windows."""
    job = Job(SMALL, "cpu", "float32", "dtype", 1, 1, 4, 2, 2, 6, str(tmp_path / "result.json"))
    return job._replace(**changes)


def test_every_layout_takes_the_steps_of_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it; and the losses fall, so that another step would be seen."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "15m", SMALL)
    flags = ["--device", "cpu", "--dtype", "float32", "--shapes", "15m", "--steps", "6", "--json"]
    flags += ["--precisions", "dtype", "--layouts", "ddp", "fsdp-tp", "--processes", "2"]
    assert scaling.main([*flags, "--batch-size", "2"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["layout"] for row in rows] == [ALONE, "DDP", "FSDP 1 x TP 2"]
    told = [line.split(", ")[-1].split(": ")[0] for line in err.splitlines()]
    assert told == [row["layout"] for row in rows]  # as soon as each is known
    assert rows[0]["losses"][0] - rows[0]["losses"][-1] > 0.001
    for row in rows:
        assert row["speed"] > 0
        assert row["memory"] > 2**20
    for row in rows[1:]:
        assert row["loss_difference"] < 1e-5
        assert row["ratio"] == pytest.approx(row["speed"] / rows[0]["speed"])


def test_the_losses_are_of_the_windows_of_all_processes(tmp_path: Path) -> None:
    """Whatever the micro-batches; other windows have others."""
    job = small_job(tmp_path)
    losses = run(job).losses
    assert run(job._replace(micro_rows=4)).losses == pytest.approx(losses, rel=1e-6)
    assert run(job._replace(rows=2)).losses != pytest.approx(losses, rel=1e-3)


def test_a_job_that_fails_is_one_line_and_its_row_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, layout = small_job(tmp_path, dtype="float12"), Layout(ALONE, 1, 1, 1)
    assert run_job(job, layout, "15m, float12") is None
    captured = capsys.readouterr().err
    assert captured.startswith("scaling: 15m, float12: ")
    assert "float12" in captured.removeprefix("scaling: 15m, float12: ")
    assert captured.count("\n") == 1
    row = make_row("15m", "float12", layout, job, None, None)
    assert row.speed is None
    assert table([row]).row_count == 1


def test_a_row_is_the_multiple_of_one_process_with_its_own_share(tmp_path: Path) -> None:
    """One process takes a quarter of the windows in a timed step, here in half of the time."""
    one, four = Layout(ALONE, 1, 1, 1), Layout("DDP", 4, 1, 1)
    config = ScalingConfig(device="cpu")
    jobs = [make_job(config, "1.1b", "dtype", layout, 8, 4) for layout in (one, four)]
    assert [job.rows for job in jobs] == [32, 32]
    assert [job.timed for job in jobs] == [8, 32]
    alone = Result([4.0, 2.0], 0.5, 7, 1e12, "GPU")
    found = Result([4.0, 2.1], 1.0, 9, 1e12, "GPU")
    row = make_row("1.1b", "bfloat16", four, jobs[1], found, alone)
    assert row.speed == 32 * 2048
    assert row.ratio == 2
    assert row.loss_difference == pytest.approx(0.05)
    without = make_row("1.1b", "bfloat16", four, jobs[1], found, None)
    assert (without.speed, without.ratio, without.loss_difference) == (row.speed, None, None)
    assert make_row("1.1b", "bfloat16", one, jobs[0], alone, alone).ratio is None


@pytest.mark.parametrize(
    ("shape", "precision", "processes", "names"),
    [
        ("1.1b", "dtype", 8, ["DDP", "FSDP 8", "FSDP 4 x TP 2"]),  # 4 key/value heads
        ("1.1b", "dtype", 4, ["DDP", "FSDP 4", "TP 4", "FSDP 2 x TP 2"]),
        ("1.1b", "dtype", 2, ["DDP", "FSDP 2", "TP 2"]),
        ("1.1b", "fp8", 8, ["DDP", "FSDP 8"]),
        ("7b", "dtype", 8, ["FSDP 8"]),
    ],
)
def test_layouts_suit_the_shape(
    shape: str, precision: str, processes: int, names: list[str]
) -> None:
    found = layouts(ScalingConfig(), shape, precision, processes)
    assert [layout.name for layout in found] == [ALONE, *names]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--processes", "1"], "--processes must be 2 or more"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--shapes", "8b"], "--shapes"),
        (["--layouts", "pp"], "--layouts"),
        (["--batch-size", "-1"], "--batch-size must be at least 0, got -1"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "15m", SMALL)
    flags = ["--shapes", "15m", "--steps", "4", "--precisions", "dtype", "--processes", "2"]
    assert scaling.main([*flags, "--batch-size", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["loss_difference"] < 1e-2 for row in rows[1:])
