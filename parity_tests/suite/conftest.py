"""The command ``llama-parity test`` in the tests' own process."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_parity.command import test as command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> Run:
    """Run ``llama-parity test`` in this process and in an empty folder, not as far as pytest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def call(*argv: str) -> tuple[int, str, str]:
        code = command.main(argv)
        return (code, *capsys.readouterr())

    return call
