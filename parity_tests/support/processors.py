"""Describe the processor, and run the numeric tests with the kernels of other processors.

``python -m parity_tests.support.processors`` runs the numeric tests once for each group of settings
that make PyTorch and NumPy choose the kernels of another processor, and prints the results. Exit
code 0: all passed, 1: not. Kernels that need a newer processor than this are listed as not run,
and so are this processor's own, with which every other run computes.
"""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent.parent
# The features by which kernels of products and loops are chosen, from the oldest to the newest.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve")


class Processor(NamedTuple):
    """Environment variables that choose the kernels of one kind of processor."""

    name: str
    needs: str  # a feature without which its kernels do not run
    newer: str  # a feature that this kind of processor does not have, and the next has
    settings: Mapping[str, str]


PROCESSORS = (
    Processor(
        "x86-64 without AVX",
        "",
        "avx2",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_CBWR": "COMPATIBLE",
            "OPENBLAS_CORETYPE": "Nehalem",
            "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
        },
    ),
    Processor(
        "AVX2",
        "avx2",
        "avx512f",
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
            "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        },
    ),
    Processor(
        "AVX-512 without bfloat16",
        "avx512f",
        "avx512_bf16",
        {
            "ATEN_CPU_CAPABILITY": "avx512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "OPENBLAS_CORETYPE": "SkylakeX",
        },
    ),
    Processor(
        "AVX-512 with bfloat16",
        "avx512_bf16",
        "amx_bf16",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "OPENBLAS_CORETYPE": "Cooperlake"},
    ),
)


def features() -> list[str]:
    """Return those of FEATURES that this processor has."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    names = found[1].split() if found else []
    return [name for name in FEATURES if name in names]


def describe() -> str:
    """Return one line: processor, its features, torch if imported, and NumPy's BLAS."""
    model = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    known = sorted({*_settings(), "PARITY_THREADS"})
    set_here = [f"{key}={os.environ[key]}" for key in known if key in os.environ]
    torch = sys.modules.get("torch")
    parts = [f"{name} ({' '.join(features()) or 'no feature known'})"]
    if torch:
        kernels, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        parts.append(f"torch {torch.__version__} ({kernels}, {threads} threads)")
    parts.append(f"NumPy {np.__version__} ({', '.join(_blas()) or 'BLAS unknown'})")
    return "; ".join(parts + set_here)


def _blas() -> list[str]:
    """Return NumPy's BLAS libraries; none without threadpoolctl."""
    if not importlib.util.find_spec("threadpoolctl"):
        return []
    import threadpoolctl

    return [
        f"{pool['internal_api']} {pool.get('version')} {pool.get('architecture', '')}".strip()
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
    ]


def _settings() -> set[str]:
    return {key for processor in PROCESSORS for key in processor.settings}


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def run(processor: Processor, arguments: Sequence[str]) -> tuple[bool, str]:
    """Run the numeric tests with a processor's kernels; return whether they passed, and output."""
    command = [sys.executable, "-m", "pytest", "parity_tests", "-q", "-m", "numeric"]
    command += ["--hypothesis-profile", "quick", *arguments]
    given = os.environ | processor.settings
    found = subprocess.run(
        command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return found.returncode == 0, found.stdout


def main(arguments: Sequence[str]) -> int:
    """Run every processor's tests; pass what follows on the command line to pytest."""
    importlib.import_module("torch")  # for the line that describes this machine
    green = True
    print(describe())
    for processor in PROCESSORS:
        if processor.needs and processor.needs not in features():
            print(f"{processor.name}: not run, this processor has no {processor.needs}", flush=True)
            continue
        if processor.newer not in features():
            print(f"{processor.name}: not run, no {processor.newer} to do without", flush=True)
            continue
        passed, output = run(processor, arguments)
        print(f"{processor.name}: {output.strip().splitlines()[-1]}", flush=True)
        if not passed:
            green = False
            settings = " ".join(f"{key}={value}" for key, value in processor.settings.items())
            print(f"{output}\nrepeat with {settings} pytest parity_tests/ -m numeric", flush=True)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
