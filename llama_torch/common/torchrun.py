"""Read torchrun's environment variables of this process."""

import os
import socket


def is_launched() -> bool:
    """Return whether torchrun started several processes; False for a job of one."""
    return process_count() > 1


def process_count() -> int:
    """Return torchrun's process count; 1 without RANK (clusters set WORLD_SIZE alone)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


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
