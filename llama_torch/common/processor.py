"""Name the processor and the libraries that a measured choice or a compiled file is good for."""

import functools
import platform
from pathlib import Path

import numpy as np
import torch

CPU_INFO = Path("/proc/cpuinfo")  # Linux's; elsewhere platform's words must do


@functools.cache
def processor() -> str:
    """Return the processor's model and features, as far as the system tells them."""
    wanted = ("model name", "cpu family", "model", "stepping", "flags", "features", "cpu part")
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    found = {name: value for name, value in fields if name.lower() in wanted}
    return repr((platform.machine(), platform.processor(), sorted(found.items())))


def libraries() -> str:
    """Return the versions of torch and NumPy, and the kernels that torch takes here."""
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}, {np.__version__}"
