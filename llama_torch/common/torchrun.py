"""Read torchrun's environment variables of this process, and end it as one of a job."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

MAIN_FIRST = 1.0  # seconds in which the main process prints what is wrong


def is_launched() -> bool:
    """Return whether torchrun started several processes; False for a job of one."""
    return process_count() > 1


def process_count() -> int:
    """Return torchrun's process count; 1 without RANK (clusters set WORLD_SIZE alone)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_process_count() -> int:
    """Return how many of the job's processes run on this machine; 1 without a job."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def is_restarted() -> bool:
    """Return whether torchrun started the job again after a process had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_main_process() -> bool:
    """Return whether this is rank 0, before a Parallel exists."""
    return os.environ.get("RANK", "0") == "0" or not is_launched()


def job_name() -> str:
    """Return the job's name, the same after a restart; empty without a job.

    It is torchrun's run id, or else host name and process id of torchrun.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name in ("", "none"):
        name = f"{socket.gethostname()}-{os.getppid()}" if is_launched() else ""
    return name


def _announce_torchrun(code: object) -> None:
    """Print, from the main process, what torchrun does after an exit code other than 0."""
    if not code or "TORCHELASTIC_RUN_ID" not in os.environ or not is_main_process():
        return
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    follows = "which torchrun reports with a traceback of its own: expect it"
    if restarts < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        follows = "after which torchrun starts the job again, unless it was stopped itself"
    print(f"note: exit code {code}, {follows}", file=sys.stderr)


def exit_process(main: Callable[[], int]) -> NoReturn:
    """Call ``main`` and end this process with the exit code it returns.

    A process of a job skips the exit handlers of torch and Python: their threads may abort the
    process, and closing a process group waits for processes that have ended. What torchrun does
    after an exit code other than 0 is announced by the main process.
    """
    if not is_launched():
        code: Any = main()
        _announce_torchrun(code)
        sys.exit(code)
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    _announce_torchrun(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and not is_main_process():
        # torchrun ends all processes once one has failed: the main one is to print why before.
        time.sleep(MAIN_FIRST)
    os._exit(code if isinstance(code, int) else 1)
