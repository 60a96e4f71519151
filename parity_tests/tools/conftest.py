"""compare.py's command, run in this process, and a checkpoint that convert.py wrote."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_parity import compare
from llama_parity.comparison import progress
from llama_torch import load

from ..support.llama3_ranks import a_llama3, encoding, gpt2_ranks
from .commands import Converted, run_convert
from .comparing import CONFIG, write


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt.safetensors", CONFIG)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr(progress, "FIRST_LINE", math.inf)  # silent, however slow the machine

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


@pytest.fixture(scope="module", params=[False, True], ids=["3", "3.1"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Converted:
    folder = tmp_path_factory.mktemp("llama3")
    a_llama3(folder / "a", gpt2_ranks(), request.param)
    run_convert(folder / "a", folder / "b")
    return Converted(folder / "a", folder / "b", encoding(gpt2_ranks()), load(folder / "b"))
