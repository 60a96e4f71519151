"""compare.py's command, run in this process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tools import compare

from .comparing import CONFIG, write


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt.safetensors", CONFIG)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = compare.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def report(run: Callable) -> Callable[..., dict[str, Any]]:
    """Run with --json; return the report, its exit code checked against the verdict."""

    def call(*argv: object) -> dict[str, Any]:
        code, out, err = run(*argv, "--json", "-")
        assert code in (0, 1), err
        found = json.loads(out)
        assert found["verdict"]["holds"] == (code == 0)
        return found

    return call


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Make an object importable; return its package.module:object."""

    def register(found: Any) -> str:
        name = f"backend_{id(found)}"
        module = ModuleType(name)
        module.it = found
        monkeypatch.setitem(sys.modules, name, module)
        return f"{name}:it"

    return register
