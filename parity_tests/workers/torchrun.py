"""Run torchrun, with its processes as forks of one that has imported the program.

``python -m parity_tests.workers.torchrun FLAGS... -m MODULE ARGUMENTS...``, as after torchrun.
torchrun's processes each import torch for some CPU seconds; forks share it. Sessions,
environments, restarts and signals are torchrun's.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from unittest.mock import patch

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
    SubprocessHandler,
)

from llama_torch.common.torchrun import exit_process

from .launch import import_program


class Forked:
    """A forked process with the methods of subprocess.Popen that torchrun calls."""

    def __init__(self, program: Callable[[], int], environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            become(environment)
            exit_process(program)

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit code; raises TimeoutExpired after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.02)
        return code


def become(environment: Mapping[str, str]) -> None:
    """Give a fork the session, signal handlers and environment of a new process."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)


def main() -> None:
    """Run torchrun's command, on the CPU."""
    # torchrun asks CUDA for its devices, and what was forked after that can use none.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    module = sys.argv[sys.argv.index("-m") + 1]
    program = import_program(module)

    def start(self: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Forked:
        sys.argv = list(args[args.index("-m") + 1 :])
        return Forked(program, env)

    with patch.object(SubprocessHandler, "_popen", start):
        run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
