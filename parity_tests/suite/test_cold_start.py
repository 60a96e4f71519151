"""Help and the errors of a command line come without torch, NumPy and other slow imports."""

import ast
import os
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import pytest

import llama_torch
from llama_torch import model

from ..support.jobs import ROOT, Job, environment

MODULES = [
    *(f"llama_torch.{name}" for name in ("train", "generate", "chat", "evaluate", "prepare")),
    *("llama_torch.export", "llama_torch.data.__main__", "llama_torch.gather", "llama_torch.gatt"),
    "llama_torch.rejection",
]
TOOLS = ["compare", "convert", "bench", "learning", "plot", "random_checkpoint", "scaling", "tasks"]
TOOLS += ["right_answers", "instruction_turns", "attention_plot", "chain"]
COMMANDS = [*MODULES, *(f"tools.{name}" for name in TOOLS)]
# What takes a quarter of a second or more to import.
SLOW = ("torch", "numpy", "safetensors.torch", "tensorboard", "matplotlib", "transformers")
STUBS = [name for name in SLOW if "." not in name]
IMPORTED = 99  # the exit code of a process that imports one of them

NOWHERE = "/nowhere/at/all"
NO_MODEL = f"{NOWHERE}: no such file"
GATT = "--model docs --prompts docs --instructions README.md"
NO_TEXT = f"--data {NOWHERE}: no file found"
REJECTION = "--reward docs --prompts README.md --out out"
# Command -> command lines that are wrong, and what their errors say.
WRONG = {
    "llama_torch.train": [
        (f"--data {NOWHERE}", NO_TEXT),
        (f"--config {NOWHERE}", "cannot be read"),
        (f"--resume --out {NOWHERE}", "holds no run"),
        ("--out README.md", "--out README.md cannot be written"),
        ("--data pyproject.toml", "--data pyproject.toml: not one of"),
        ("--tp 3", "--tp 3: 1 process cannot be shared out so"),
        ("--lr -1", "--lr must be positive"),
    ],
    "llama_torch.sft": [
        ("--data pyproject.toml", "--init-from is missing: name the model directory to fine-tune"),
        (f"--init-from {NOWHERE}", f"--init-from {NOWHERE}: holds no config.json"),
        ("--epochs 0", "--epochs must be positive"),
        ("--steps -1", "--steps must not be negative"),
        (f"--resume --out {NOWHERE}", "holds no run"),
    ],
    "llama_torch.reward": [
        ("--data pyproject.toml", "--init-from is missing: name the model directory to fine-tune"),
        (f"--init-from {NOWHERE}", f"--init-from {NOWHERE}: holds no config.json"),
        ("--verify-every 5", "--verify-every is not for reward models: leave it out"),
        ("--tp 2", "--tp is not for reward models: leave it out, got 2"),
        ("--margin huge", "--margin"),
    ],
    "llama_torch.ppo": [
        ("--data pyproject.toml", "--init-from is missing: name the model directory to fine-tune"),
        (f"--init-from {NOWHERE}", f"--init-from {NOWHERE}: holds no config.json"),
        ("--fsdp 2", "--fsdp is not for reinforcement learning: leave it out, got 2"),
        ("--rollout-batch 100", "--rollout-batch must be a multiple of the minibatch"),
        (f"--resume --out {NOWHERE}", "holds no run"),
    ],
    "llama_torch.rejection": [
        ("--prompts README.md", "--model and --reward: required"),
        ("--model docs --reward docs", "--prompts is missing: name the files"),
        (f"--model docs --reward docs --out out --prompts {NOWHERE}", "--prompts /nowhere/at/all:"),
        (f"--model {NOWHERE} {REJECTION}", NO_MODEL),
        (f"--model docs {REJECTION}", "docs/model.safetensors: no such file"),
        (f"--model docs {REJECTION} --samples 0", "--samples must be positive"),
        (f"--model docs {REJECTION} --top-p 2", "--top-p must be above 0"),
        (f"--model docs {REJECTION} --temperature 0", "--temperature 0 draws the same answer each"),
    ],
    "llama_torch.generate": [
        (f"--prompt x --ckpt {NOWHERE}", NO_MODEL),
        ("--prompt x --ckpt README.md", "README.md: not a complete safetensors file"),
        ("--prompt x --ckpt docs", "docs/model.safetensors: no such file"),
        ("--ckpt docs", "--prompt: required"),
    ],
    "llama_torch.chat": [
        (f"--ckpt {NOWHERE}", NO_MODEL),
        ("--system x", "--ckpt: required"),
        (f"--ckpt docs --template {NOWHERE}", f"--template {NOWHERE}: no such file"),
    ],
    "llama_torch.evaluate": [
        (f"--ckpt {NOWHERE}", NO_MODEL),
        ("--ckpt docs --data docs", "docs/model.safetensors: no such file"),
    ],
    "llama_torch.prepare": [
        (f"--out out --data {NOWHERE}", NO_TEXT),
        (f"--verify {NOWHERE}", f"--verify {NOWHERE}: no such folder"),
        ("--data docs", "--out is needed"),
    ],
    "llama_torch.data.__main__": [(f"--out out --data {NOWHERE}", NO_TEXT)],
    "llama_torch.export": [(NOWHERE, "holds no run"), ("", "RUN: required")],
    "llama_torch.gather": [(NOWHERE, "holds no run")],
    "llama_torch.gatt": [
        ("--model docs", "--prompts and --instructions and --out: required"),
        (f"{GATT} --out docs", "--out docs: is there already"),
        (f"{GATT} --out out --model {NOWHERE}", NO_MODEL),
        (f"{GATT} --out out --turns -1", "--turns must lie between 0"),
        (f"{GATT} --out out --template {NOWHERE}", f"--template {NOWHERE}: no such file"),
    ],
    "tools.compare": [
        (NOWHERE, NO_MODEL),
        ("README.md", "README.md: not a complete safetensors file"),
        ("docs", "docs/model.safetensors: no such file"),
        ("", "CKPT: required"),
    ],
    "tools.convert": [(f"{NOWHERE} out", NO_MODEL), ("docs README.md", "docs: holds neither")],
    "tools.bench": [("--works decod", "did you mean decode?"), ("--repeats 0", "--repeats")],
    "tools.tasks": [("docs", "docs: is there already"), ("", "FOLDER: required")],
    "tools.chain": [
        ("docs", "docs: is no folder of a chain"),
        ("docs --until nothing", "--until nothing: choose one of base, sft"),
    ],
    "tools.right_answers": [(f"docs {NOWHERE}", f"{NOWHERE}: no such file")],
    "tools.attention_plot": [
        ("a.txt --before docs --after docs --data docs", "a.txt: the picture's name must end in"),
        (f"a.png --before {NOWHERE} --after docs --data docs", NO_MODEL),
        (f"{NOWHERE}/a.png --before docs --after docs --data docs", "there is no directory"),
    ],
    "tools.instruction_turns": [
        (f"docs {NOWHERE}", f"{NOWHERE}: no such file"),
        ("docs README.md", "README.md:1: is no dialogue of tools/tasks.py"),
    ],
    "tools.scaling": [("--layouts ddb", "not one of ddp, fsdp"), ("--steps 0", "--steps")],
    "tools.learning": [
        (f"--data {NOWHERE}", NO_TEXT),
        (f"--out {NOWHERE}/losses.json", "there is no such folder"),
    ],
    "tools.plot": [
        (f"{NOWHERE} a.svg", "no such directory"),
        ("docs a.txt", "must end in .svg"),
        (f"docs {NOWHERE}/a.svg", "there is no directory"),
    ],
    "tools.random_checkpoint": [
        ("out --shape 8b", "--shape 8b: not one of tiny, 7b, 13b, 70b"),
        ("README.md/out", "README.md/out"),
    ],
}
PROGRAM = """
import contextlib, importlib, importlib.machinery, io, sys
class Refusing:  # finds a slow module, and fails to import it
    def find_spec(self, name, *_):
        return importlib.machinery.ModuleSpec(name, self) if name in {slow} else None
    def create_module(self, spec):
        raise ImportError(spec.name + " is slow to import")
    def exec_module(self, module): ...
sys.meta_path.insert(0, Refusing())
main = importlib.import_module({command!r}).main
found = []
for argv in {lines}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as ended:
            code = ended.code or 0
    found.append((code, out.getvalue(), err.getvalue()))
print(found)
"""
HELPS = [["--help"], ["-h"], ["--help-all"], ["--qqqq", "4"]]


@cache
def outcomes(command: str) -> list[tuple[int, str, str]]:
    """Return the exit code, stdout and stderr of each of a command's lines, without slow modules.

    The first four are those of HELPS.
    """
    lines = [*HELPS, *(line.split() for line, _ in WRONG[command])]
    program = PROGRAM.format(slow=SLOW, command=command, lines=lines)
    done = Job(lambda _: ("-c", program)).done()
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str, str]] = ast.literal_eval(done.stdout)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_slow(command: str) -> None:
    *helps, misspelt = outcomes(command)[: len(HELPS)]
    for code, out, err in helps:
        assert (code, err) == (0, "")
        assert out.startswith("usage: python ")
    assert misspelt == (2, "", "error: --qqqq 4: no such flag; see --help\n")


@pytest.mark.parametrize(
    ("command", "n"), [(command, n) for command in COMMANDS for n in range(len(WRONG[command]))]
)
def test_a_wrong_command_line_is_told_before_slow_imports(command: str, n: int) -> None:
    code, out, err = outcomes(command)[len(HELPS) + n]
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert WRONG[command][n][1] in err


@pytest.mark.parametrize(
    ("command", "line"),
    [*((command, "--help") for command in COMMANDS), ("llama_torch.train", "--lr -1")],
)
def test_a_process_as_a_user_starts_it_imports_nothing_slow(
    command: str, line: str, without_slow: Path
) -> None:
    """Prints its CPU seconds (pytest -rP), of which a slow machine takes more."""
    script = f"{command.replace('.', '/')}.py"
    start = [script] if command.startswith("tools") else ["-m", command.removesuffix(".__main__")]
    code, seconds = run([*start, *line.split()], without_slow)
    assert code == (0 if line == "--help" else 2)
    print(f"{command} {line}: {seconds:.2f} s of CPU time")


def test_a_slow_import_of_a_process_would_be_seen(without_slow: Path) -> None:
    for name in STUBS:
        assert run(["-c", f"import {name}"], without_slow)[0] == IMPORTED


@pytest.fixture(scope="module")
def without_slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of modules in place of the slow ones, which end their process."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in STUBS:
        (folder / f"{name}.py").write_text(f"import os\nos._exit({IMPORTED})\n")
    return folder


def run(arguments: list[str], modules: Path) -> tuple[int, float]:
    """Run ``python`` with modules before the installed ones; return exit code and CPU seconds."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=os.pathsep.join([str(modules), str(ROOT)])),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def test_a_slow_import_would_be_seen() -> None:
    program = PROGRAM.format(slow=SLOW, command="llama_torch.training.loop", lines=[])
    done = Job(lambda _: ("-c", program)).done()
    assert done.returncode == 1
    assert "torch is slow to import" in done.stderr


# The public names


PUBLIC = Job(
    lambda _: (
        "-c",
        "import sys, llama_torch\n"
        "assert 'torch' not in sys.modules\n"
        "llama_torch.InputError, llama_torch.SamplingConfig\n"
        "assert 'torch' not in sys.modules\n"
        "from llama_torch import *\n"
        "from llama_torch import load, TextModel, SamplingConfig, Completion, InputError\n"
        "assert 'torch' in sys.modules\n",
    )
)


def test_the_public_names_import_torch_at_their_first_use() -> None:
    assert PUBLIC.done().returncode == 0, PUBLIC.done().stderr


@pytest.mark.parametrize("package", [llama_torch, model], ids=lambda package: package.__name__)
def test_a_package_lists_its_public_names(package: types.ModuleType) -> None:
    for name in package.__all__:
        assert name in dir(package)
        assert hasattr(package, name)
    assert not hasattr(package, "lod")
