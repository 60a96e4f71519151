"""Run trainers that are killed: ``python -m parity_tests.workers.killed_trainer PLAN.json``.

For test_kills.py. Torch is imported once, and each attempt of the run is a fork. It is killed with
SIGKILL after a number of seconds, or just before its n-th write to the run directory (for tensors
in the middle of it), or cannot write a file beyond a number of bytes. After each attempt every
checkpoint and model must load.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llama_torch import train
from llama_torch.checkpoint import hf, step_folders, training_state

from .launch import import_late, share_constants

TOUCHES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def live(
    argv: list[str], out: Path, touch: int = 0, seconds: float = 0.0, longest: int = 0
) -> int | None:
    """Run the trainer in a child; return its exit code, or None if it was killed."""

    def run() -> int:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if longest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
        return train.main(argv)

    return in_child(run, out, touch, seconds)


def in_child(run: Callable[[], int], out: Path, touch: int = 0, seconds: float = 0.0) -> int | None:
    """Call ``run`` in a fork; return what it returns, or None if it was killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            die_at(touch, out)
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    return os.WEXITSTATUS(status)


def die_at(touch: int, out: Path) -> None:
    """Kill this process at its ``touch``-th further write to the directory ``out``; 0: never."""
    left = touch

    def touched(before_dying: Callable[[], object] = lambda: None) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            before_dying()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        writes = event in TOUCHES or (event == "open" and args[1] and args[1][0] in "wax")
        inside = bool(args) and str(args[0]).startswith(str(out))
        # A folder's own files are removed by their names in it.
        if writes and (inside or (event in ("os.remove", "os.rmdir") and args[1] != -1)):
            touched()

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        saved(tensors, path, metadata)
        touched(lambda: os.truncate(path, path.stat().st_size // 2))

    def fsync(handle: int) -> None:
        touched()
        synced(handle)

    saved, synced = hf.save_file, os.fsync
    patch.object(hf, "save_file", save_file).start()
    patch.object(os, "fsync", fsync).start()
    sys.addaudithook(audit)


def kill_every_commit(out: Path) -> int:
    """Kill commits of a third checkpoint, each before another write; return the number of writes.

    After each kill every checkpoint must be complete or absent.
    """
    (out / step_folders.FOLDER).mkdir(parents=True)
    for step in (1, 2):
        step_folders.commit(out, step, fill)
    for touch in range(1, 100):
        step = int(step_folders.newest(out).name) + 1

        def run(step: int = step) -> int:
            step_folders.commit(out, step, fill)
            return 0

        died = in_child(run, out, touch) is None
        folders = [p for p in (out / step_folders.FOLDER).glob("*") if p.suffix != ".tmp"]
        for folder in folders:
            assert sorted(path.name for path in folder.iterdir()) == ["one", "two"], touch
        assert len(folders) >= 2
        step_folders.remove_temporary(out)
        assert not list(out.rglob("*.tmp"))
        if not died:
            return touch - 1
    raise AssertionError("no end of touches")


def fill(folder: Path) -> None:
    """Write two files, of which a complete checkpoint has both."""
    for name in ("one", "two"):
        (folder / name).write_text(name)


def require_readable(out: Path) -> None:
    """Load every checkpoint and model directory that is not temporary."""
    folders = [path for path in (out / step_folders.FOLDER).glob("*") if path.suffix != ".tmp"]
    for folder in folders:
        tensors, step, _ = training_state.load_state(folder)
        assert tensors
        assert folder.name == str(step)
    for directory in (out, out / step_folders.BEST):
        there = directory != out and directory.is_dir()
        if there or (directory / hf.MODEL_FILE).exists() or len(folders) > 1:
            hf.load_model(directory)


def main(plan_file: str) -> None:
    """Run the plan's attempts; print the number of those that were killed."""
    plan = json.loads(Path(plan_file).read_text())
    out = Path(plan["out"])
    torch.set_num_threads(1)
    import_late()
    share_constants()
    assert kill_every_commit(out.with_name("commits")) > 10
    flags = [*plan["flags"], "--out"]
    assert live([*flags, plan["whole"]], out) == 0
    deaths = 0
    for how in [*plan["lives"], {}]:
        resume = ["--resume", "--out"] if (out / "run.json").exists() else flags
        code = live([*resume, str(out)], out, **how)
        deaths += code is None
        assert code == 2 if "longest" in how else code in (0, None), (code, how)
        require_readable(out)
        if code is not None:
            left_over = [path for path in out.rglob("*") if ".tmp" in path.name]
            assert not left_over, left_over
    assert code == 0
    print(deaths)


if __name__ == "__main__":
    main(sys.argv[1])
