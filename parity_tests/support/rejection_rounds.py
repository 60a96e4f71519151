"""Run small rounds of rejection sampling, and read what they leave."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_torch.model.config import ModelConfig
from llama_torch.rejection import main

from .trainer_runs import refused_line

CONFIG = ModelConfig(16, 2, 4, 2, 4, 24, 520, 96, 1e-5, 10000.0, False)
CLOSE = 1e-9
N, K = 5, 4  # prompts, and answers to each
Lines = list[dict[str, Any]]


def flags_of(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder / "policy"), "--reward", str(folder / "reward")),
        *("--prompts", str(folder / "prompts.jsonl"), "--out", str(out), "--samples", str(K)),
        *("--max-new-tokens", "12", "--dtype", "float64", "--device", "cpu", *more),
    ]


def lines_of(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewards(lines: Lines) -> list[list[float]]:
    return [[sample["reward"] for sample in line["samples"]] for line in lines]


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a command that is refused."""
    return refused_line(main, argv, capsys).removeprefix("error: ")


def same_round(found: Lines, expected: Lines) -> bool:
    """Return whether two rounds drew the same answers with the same scores, up to rounding."""
    bare = [[[s["ids"] for s in line["samples"]] for line in side] for side in (found, expected)]
    return bare[0] == bare[1] and all(
        one == pytest.approx(other, abs=CLOSE)
        for one, other in zip(rewards(found), rewards(expected), strict=True)
    )
