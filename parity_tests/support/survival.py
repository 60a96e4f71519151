"""Interrupt training runs, and compare their results with the uninterrupted run's."""

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_torch import train
from llama_torch.checkpoint import step_folders
from llama_torch.checkpoint.file_names import STATE_FILE
from llama_torch.checkpoint.hf import read_metadata
from llama_torch.training import loop, setup, source, validate

from .trainer_runs import scalars

ROOT = Path(__file__).parent.parent.parent

STEPS = 6

SHAPE = [
    *("--dim", "4", "--n-layers", "1", "--n-heads", "2", "--n-kv-heads", "1"),
    *("--hidden-dim", "8", "--max-seq-len", "16", "--batch-size", "2", "--device", "cpu"),
    *("--warmup-steps", "2", "--log-every", "1", "--eval-every", "2", "--eval-batches", "1"),
    *("--sample-every", "0", "--dtype", "float32"),
]


def resume(out: Path, *more: str) -> int:
    return train.main(["--resume", "--out", str(out), *more])


def require_same(one: Path, other: Path) -> None:
    """Assert that two runs' logged values, newest checkpoints and exports are equal to the bit."""
    newest = step_folders.newest(one).relative_to(one)
    assert step_folders.newest(other) == other / newest
    for name in (newest / STATE_FILE, Path("model.safetensors"), Path("best/model.safetensors")):
        assert read_metadata(one / name) == read_metadata(other / name)
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    first, second = scalars(one), scalars(other)
    for tag in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "train/bad_steps"):
        assert repr(first.get(tag)) == repr(second.get(tag)), tag  # NaN is NaN


def left_over(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if ".tmp" in path.name]


# Signals


def call_before(name: str, call: int, do: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Call ``do`` before the ``call``-th call (from 1) of a function of the training loop."""
    owner = next(module for module in (loop, setup, source, validate) if hasattr(module, name))
    real, count = getattr(owner, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(count) == call:
            do()
        return real(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


def send_signal(number: int) -> None:
    for child in multiprocessing.active_children():  # a terminal's Ctrl-C goes to all
        os.kill(child.pid, number)
    os.kill(os.getpid(), number)


numbers = st.floats() | st.floats(0, 50) | st.sampled_from([math.nan, math.inf, -math.inf])
