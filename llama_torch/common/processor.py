"""Name the processor and the libraries that a measured choice or a compiled file is good for."""

import functools
import platform
from pathlib import Path

import numpy as np
import torch

CPU_INFO = Path("/proc/cpuinfo")  # Linux's; elsewhere platform's words must do
FEATURES = ("flags", "features", "isa")  # of x86, of ARM and others, of RISC-V


@functools.cache
def processor() -> str:
    """Return the processor's model and features, as far as the system tells them.

    Where it does not tell the features, with the machine's name: a folder may be shared with
    another machine, where a file compiled for this one would end the process.
    """
    wanted = ("model name", "cpu family", "model", "stepping", "cpu part", *FEATURES)
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    found = {name: value for name, value in fields if name.lower() in wanted}
    words = platform.machine(), platform.processor(), sorted(found.items())
    has_features = any(name.lower() in FEATURES for name in found)
    return repr(words if has_features else (*words, platform.node()))


def libraries() -> str:
    """Return the versions of torch and NumPy, and the kernels that torch takes here."""
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}, {np.__version__}"
