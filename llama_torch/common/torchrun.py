"""What torchrun says of this process in its environment."""

import os
import socket


def is_launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return process_count() > 1


def process_count() -> int:
    """Return how many processes torchrun started; clusters set the number alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_restarted() -> bool:
    """Return whether torchrun started the job again after a process had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_main_process() -> bool:
    """Return whether this process speaks for all, before there is a Parallel to ask."""
    return os.environ.get("RANK", "0") == "0" or not is_launched()


def job_name() -> str:
    """Return what this job is called, the same after a restart; empty where there is none.

    That is torchrun's name for it, or else its own process, the parent of these.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name in ("", "none"):
        name = f"{socket.gethostname()}-{os.getppid()}" if is_launched() else ""
    return name
