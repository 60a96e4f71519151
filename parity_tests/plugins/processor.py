"""Describe the processor, and the settings that choose the kernels of others."""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
