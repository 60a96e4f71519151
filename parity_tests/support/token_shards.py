"""Prepare token shards in processes that are killed, or until the disk is full."""

import errno
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_common import files
from llama_common.errors import InputError
from llama_torch.data.shard_writer import prepare
from llama_torch.data.text_files import Text

from . import state_files

LINES = [f"Line {i} tells of {i * i} llamas, and a hill.\n" for i in range(60)]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_child(work: Callable[[], Any]) -> int:
    """Run ``work`` in a forked process; return its exit code, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork beside threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(moment: int, text: Text, folder: Path, workers: int) -> int:
    """Prepare in a process that is killed at its ``moment``-th flush; return its exit code."""

    def work() -> None:
        moments, real = iter(range(moment)), files.flush

        def flush(path: Path) -> None:
            if next(moments, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "flush", flush)
            prepare(text, folder, workers, 1000)

    return in_child(work)


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stopped_at(name: str, text: Text, folder: Path, size: int) -> None:
    """Prepare with a disk that is full at the shard ``name``; the error must say so."""
    real = files.flush

    def flush(path: Path) -> None:
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "flush", flush)
        assert "No space left" in refused(lambda: prepare(text, folder, 1, size))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def edit(**changes: Any) -> Callable[[Path], None]:
    def work(path: Path) -> None:
        index = path.parent / "index.json"
        state_files.write(index, state_files.read(index) | changes)

    return work
