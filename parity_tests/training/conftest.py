"""Fixtures of small training runs, shared by the tests of interruptions."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_torch import train
from llama_torch.training import throughput

from ..support.model_directories import KINDS, write_model
from ..support.survival import SHAPE, STEPS
from ..support.trainer_runs import TEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def flags(text: str) -> list[str]:
    return [*SHAPE, "--data", text, "--steps", str(STEPS), "--save-every", "1"]


@pytest.fixture(autouse=True)
def _handle_sigint() -> Iterator[None]:
    """Handle SIGINT, which a shell's background jobs and their children ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "peak_flops", lambda *_: 1e9)
        patch.setenv("XDG_CACHE_HOME", str(out.parent))
        assert train.main([*flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory for each kind of tokenizer."""
    found = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in KINDS}
    for kind, (dtype, n_files) in KINDS.items():
        write_model(found[kind], kind, dtype, n_files)
    return found
