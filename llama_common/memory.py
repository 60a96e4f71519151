"""How much memory a process can have at all: the machine's and its swap, or its group's share."""

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def host_memory() -> int:
    """Return the bytes of memory and swap that this machine, or the process's group in it, has.

    It is an upper bound: what other processes hold of it is not subtracted.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(memory, _group_limit()) + _swap())


def gib(n_bytes: int, digits: int = 1) -> str:
    """Return a number of bytes as text, in GiB, for people."""
    return f"{n_bytes / 2**30:,.{digits}f} GiB"


def _swap() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("SwapTotal:"):
                return int(line.split()[1]) * 1024
        return 0
    return shutil.disk_usage("/").free  # macOS makes swap files as it needs them


def _group_limit() -> float:
    """Return the smallest limit of the process's cgroup (version 1 or 2) and those around it."""
    limits = [math.inf]
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                name = "memory.limit_in_bytes" if controllers else "memory.max"
                limits += _limits(GROUPS / controllers, path, name)
    return min(limits)


def _limits(root: Path, path: str, name: str) -> list[float]:
    """Return the limits of a group and of those above it; in a container its own is the root."""
    folder = root / path.lstrip("/")
    found = []
    for group in (folder, *folder.parents):
        with suppress(OSError, ValueError):
            found.append(float((group / name).read_text(encoding="ascii")))  # "max": none
        if group == root:
            break
    return found
