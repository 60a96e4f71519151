"""bench.py: a table from a tiny run, and one line for what it cannot measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import bench
from tools.bench_sides import Setup, Side, alternate, same_tokens

ROOT = Path(bench.__file__).resolve().parent.parent
HEADINGS = "work shape dtype ours peer peer's ratio of limit"
TINY = ["--device", "cpu", "--repeats", "1", "--new-tokens", "4", "--shape", "default"]


def test_the_command_prints_a_table() -> None:
    """As a user runs it: a process of its own, from the repository root."""
    command = [sys.executable, "tools/bench.py", *TINY, "--works", "decode", "prefill"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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
    row = bench.Row("decode", "15m", "float32", 2.0, "llama.cpp", None, None, 0.5)
    monkeypatch.setitem(bench.WORKS, "decode", lambda setup: [row])
    assert bench.main([*TINY, "--works", "decode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row._asdict()]


def test_sides_that_differ_are_not_timed() -> None:
    setup = Setup("default", "float32", torch.device("cpu"), 1, 4, 4, False)
    calls = {"ours": [1, 2], "peer": [1, 2], "(limit)": None, "ours, otherwise": [3]}
    sides: dict[str, Side | None] = {n: Side(lambda t=t: t, 1) for n, t in calls.items()}
    assert set(alternate(sides, setup, same_tokens)) == set(calls)
    sides["peer"] = Side(lambda: [1, 3], 1)
    with pytest.raises(RuntimeError, match="decode different tokens"):
        alternate(sides, setup, same_tokens)
    assert alternate(sides, setup._replace(dtype="bfloat16"), same_tokens)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
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
