"""Ctrl-C while a command's modules are imported ends it without a traceback, at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

from llama_common import cli, interrupt

from ..backends.torch_model import small_model

ROOT = Path(__file__).parent.parent.parent
COMMANDS = [
    *(
        ("-m", f"llama_torch.{name}")
        for name in ("train", "generate", "chat", "evaluate", "prepare", "export", "data", "gather")
    ),
    *(
        (f"tools/{name}.py",)
        for name in ("bench", "compare", "convert", "learning", "plot", "random_checkpoint")
    ),
]
# A library that is interrupted amid its import, and makes something else of it.
INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
except BaseException:
    raise ImportError("cannot load module more than once per process")
"""


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_it_ends_a_command_that_imports_its_libraries(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "tyro.py").write_text(INTERRUPTED)
    done = python(*command, "--help", path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("command", ["generate", "evaluate", "chat"])
def test_it_ends_a_command_that_imports_torch_later(
    tmp_path: Path, ckpt: Path, command: str
) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    flags = {"generate": ["--prompt", "a"], "evaluate": ["--data", "README.md"]}.get(command, [])
    done = python("-m", f"llama_torch.{command}", "--ckpt", str(ckpt), *flags, path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_it_leaves_no_traceback_at_random_times(ckpt: Path, tmp_path: Path) -> None:
    """But in Python's own start-up, which the site module ends."""
    out = str(tmp_path / "out")
    arguments = {
        "llama_torch.train": ["--steps", "100000", "--out", out],
        "llama_torch.generate": ["--ckpt", str(ckpt), "--prompt", "a"],
        "llama_torch.chat": ["--ckpt", str(ckpt)],
        "llama_torch.evaluate": ["--ckpt", str(ckpt)],
        "llama_torch.prepare": ["--out", out, "--workers", "2"],
        "llama_torch.data": ["--out", out],
        "tools/compare.py": [str(ckpt / "model.safetensors")],
        "tools/convert.py": [str(ckpt), out],
        "tools/random_checkpoint.py": [out, "--n-layers", "1"],
    }
    rng = random.Random(settings.default.max_examples)
    for _ in range(1 + settings.default.max_examples // 12):
        command = rng.choice(COMMANDS)
        process = subprocess.Popen(
            [sys.executable, *command, *arguments.get(command[-1], ["--help"])],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(rng.uniform(0.1, 1.7) ** 2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
        err = process.communicate(timeout=60)[1]
        assert "Traceback" not in err or "<frozen site>" in err, (command, err)
        assert process.returncode in (-signal.SIGINT, 130, 0, 1, 2), (command, err)


def test_a_library_changes_no_handler() -> None:
    program = (
        "import signal, llama_torch, llama_common.cli, llama_torch.prepare\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "llama_common.interrupt.end_while_importing()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
    )
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("original", "seen", "is_command"),
    [
        (["python", "-m", "llama_torch.train", "--x"], ["-m", "--x"], True),
        (["python", "-X", "dev", "-mllama_torch.train"], ["-m"], True),
        (["python", "-m", "pytest", "llama_torch.train"], ["-m", "llama_torch.train"], False),
        (["python", "-m", "another"], ["-m"], False),
        (["python", "-m", "pytest"], ["/lib/pytest/__main__.py"], False),
        (["python", "script.py", "-m", "llama_torch.train"], ["script.py", "-m", "llama_t"], False),
        (["python", "-c", "import llama_torch"], ["-c"], False),
        (["python"], [""], False),
        ([""], [], False),
    ],
)
def test_a_command_is_told_from_a_library(
    monkeypatch: pytest.MonkeyPatch, original: list[str], seen: list[str], is_command: bool
) -> None:
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", seen)
    assert interrupt.is_starting_command("llama_torch") is is_command


def test_a_command_can_be_interrupted_and_gives_the_signal_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
        return 0

    before = signal.getsignal(signal.SIGINT)
    try:
        for action in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signal.SIGINT, action)
            assert cli.run(main) == 130
            assert signal.getsignal(signal.SIGINT) is action
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n" * 2
