"""bench.py: the tables of a tiny run, and one line for a side that fails."""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from llama_torch.model.config import ModelConfig
from tools import bench
from tools.benchmarks import reward_sides, training, training_side
from tools.benchmarks.timing import Setup, SpeedRow, TimedCall, same_tokens, time_alternately
from tools.benchmarks.training import TrainRow
from tools.benchmarks.training_side import Result
from tools.benchmarks.works import WORKS
from tools.shapes import SHAPES

from ..support.jobs import Job

ROOT = Path(bench.__file__).resolve().parent.parent
HEADINGS = "work shape dtype ours peer peer's ratio of limit"
TINY = ["--device", "cpu", "--repeats", "1", "--new-tokens", "4", "--shape", "default"]


TABLE = Job(lambda _: ("tools/bench.py", *TINY, "--works", "decode", "prefill"))


def test_the_command_prints_a_table() -> None:
    """As a user runs it: a process of its own, from the repository root."""
    done = TABLE.done()
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.replace("┃", " ").split()) for line in done.stdout.splitlines()]
    assert HEADINGS in lines, done.stdout
    for work in ("decode", "prefill"):
        rows = [
            line.split("│") for line in done.stdout.splitlines() if line.startswith(f"│ {work}")
        ]
        peers = {row[5].strip(): row for row in rows}
        assert set(peers) == {"transformers", "llama.cpp"}, done.stdout
        for row in rows:
            assert float(row[4].replace(",", "")) > 0
            assert int(row[8].strip().rstrip("%")) > 0
            if "not installed" not in row[6]:
                assert float(row[7]) > 0


def test_rows_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = SpeedRow("decode", "15m", "float32", 2.0, "llama.cpp", None, None, 0.5)
    other = TrainRow("train", "15m", "float32", 2.0, 0.5, 9, "transformers", None, None, None)
    monkeypatch.setitem(WORKS, "decode", lambda setup: [row])
    monkeypatch.setitem(WORKS, "train", lambda setup: [other])
    assert bench.main([*TINY, "--works", "decode", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row._asdict(), other._asdict()]


@contextmanager
def worker_here(job: training_side.Job) -> Iterator[training.TakeSteps]:
    """Take a side's steps in this process, to save the start of another."""
    asked: list[int] = []
    results = training_side.run(job)

    def ask(steps: int) -> Result:
        asked.append(steps)
        with patch.object(sys, "stdin", iter(asked.pop, None)):
            return next(results)

    yield ask


def test_training_is_measured_and_a_side_that_fails_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller shape, and a side that does not exist; it and ours have a process each."""
    own = training.side_process

    def worker(job: training_side.Job) -> AbstractContextManager[training.TakeSteps]:
        return own(job) if job.side in ("ours", "missing") else worker_here(job)

    small = ModelConfig(32, 2, 2, 1, vocab_size=64, max_seq_len=16)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "default", small)
    monkeypatch.setattr(training, "side_process", worker)
    monkeypatch.setattr(training, "ON_CPU", ("ours", "transformers", "plain loop", "missing"))
    assert bench.main([*TINY, "--works", "train"]) == 0
    out, err = capsys.readouterr()
    assert err == "train: missing: KeyError: 'missing'\n"
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│ train")]
    assert [row[7].strip() for row in rows] == ["transformers", "plain loop", "missing"], out
    for row in rows:
        assert float(row[4].replace(",", "")) > 0
        assert 0 <= float(row[5].strip().rstrip("%")) < 100  # rounded: of a tiny model, to nothing
        assert float(row[6]) > 0
    for row in rows[:2]:
        assert all(float(cell.replace(",", "")) > 0 for cell in row[8:11])
    assert [cell.strip() for cell in rows[2][8:11]] == ["-", "-", ""]


@pytest.mark.filterwarnings("ignore")  # of TRL's libraries
def test_fine_tuning_is_measured_beside_pretraining_and_trl(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All on the same rows; TRL's first loss is ours, or the table would be refused."""
    pytest.importorskip("trl")
    own = training.side_process

    def worker(job: training_side.Job) -> AbstractContextManager[training.TakeSteps]:
        return own(job) if job.side == training_side.TRL else worker_here(job)

    small = ModelConfig(32, 2, 2, 1, vocab_size=64, max_seq_len=16)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "default", small)
    monkeypatch.setattr(training, "side_process", worker)
    assert bench.main([*TINY, "--works", "sft", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["peer"] for row in rows] == [training_side.PRETRAINING, training_side.TRL]
    for row in rows:
        assert row["work"] == "sft"
        assert row["ours"] > 0
        assert row["peer_speed"] > 0
        assert 0 <= row["mfu"] < 1


def test_a_reward_models_step_is_measured_on_tokens_that_are_no_padding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside TRL's it is measured by training/test_reward_trl.py."""
    small = ModelConfig(32, 2, 2, 1, vocab_size=64, max_seq_len=16, tie_embeddings=True)
    monkeypatch.setitem(SHAPES, "default", small)
    monkeypatch.setattr(training, "side_process", worker_here)
    assert bench.main([*TINY, "--works", "reward", "--ours-alone", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["work"], row["peer"], row["ratio"]) == ("reward", "none", None)
    assert row["ours"] > 0
    assert 0 < row["mfu"] < 1
    pairs = reward_sides.bench_pairs(small, 4)
    turns = [Result([], 1, 5.0, 1e9), Result([0.5], 1, 5.0, 1e9)]
    setup = Setup("default", "float32", torch.device("cpu"), 1, 0, 4, False)
    results = {reward_sides.REWARD: turns, reward_sides.TRL_REWARD: turns}
    [row] = training.training_rows(setup, small, 4, "float32", results, "reward")
    assert row.ours == row.peer_speed == len(pairs.tokens) / 0.5
    assert (pairs.lengths.min(), pairs.lengths.max()) >= (2, 10)
    assert pairs.lengths.max() <= 16


def test_training_tables_without_ours() -> None:
    setup = Setup("default", "float32", torch.device("cpu"), 2, 0, 4, False)
    turns = [Result([], 1, 5.0, 1e9), Result([0.5], 1, 5.0, 1e9), Result([0.25], 2, 5.0, 1e9)]
    config = ModelConfig()
    with_ours = {"ours": turns, "plain loop": [turn._replace(peak_bytes=7) for turn in turns]}
    row = training.training_rows(setup, config, 4, "float32", with_ours)[1]
    assert row[3:] == (3072, row.mfu, 2, "plain loop", 3072, 7, 1)
    [row] = training.training_rows(setup, config, 4, "float32", {"plain loop": turns})[1:2]
    assert row[3:] == (None, None, None, "plain loop", 3072, 2, None)


def test_training_losses_that_differ_are_refused() -> None:
    training.same_losses({"ours": 10.0, "peer": 10.0005}, "float32")
    training.same_losses({"ours": 10.0, "peer": 10.05}, "bfloat16")
    training.same_losses({"peer": 10.0, "another": 5.0}, "float32")
    for loss, dtype in ((10.002, "float32"), (10.2, "bfloat16"), (float("nan"), "float32")):
        with pytest.raises(RuntimeError, match="the first loss of peer"):
            training.same_losses({"ours": 10.0, "peer": loss}, dtype)


def test_sides_that_differ_are_not_timed() -> None:
    setup = Setup("default", "float32", torch.device("cpu"), 1, 4, 4, False)
    calls = {"ours": [1, 2], "peer": [1, 2], "(limit)": None, "ours, otherwise": [3]}
    sides: dict[str, TimedCall | None] = {n: TimedCall(lambda t=t: t, 1) for n, t in calls.items()}
    assert set(time_alternately(sides, setup, same_tokens)) == set(calls)
    sides["peer"] = TimedCall(lambda: [1, 3], 1)
    with pytest.raises(RuntimeError, match="decode different tokens"):
        time_alternately(sides, setup, same_tokens)
    assert time_alternately(sides, setup._replace(dtype="bfloat16"), same_tokens)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 0, got -1"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
        (["--new-tokens", "8193"], "--new-tokens must be at most 8192, got 8193"),
        (["--repeats", "1000000000"], "--repeats must be at most 100000, got 1000000000"),
        (
            ["--works", "train", "--device", "cpu", "--batch-size", "1000000000"],
            "--batch-size 1000000000, --max-seq-len 256, ",
        ),
        (["--works", "sleep"], "--works"),
        (["--shape", "8b"], "--shape"),
        (["--compiled-peer", "--device", "cpu"], "--compiled-peer"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_value_is_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
