"""Which device to run on, and which precision it computes natively."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from llama_common.errors import InputError
from llama_common.memory import host_memory


def pick_device(name: str) -> torch.device:
    """Return the asked-for device, or the best there is for ``auto``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name!r} is not one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that a GPU has, or that this machine has for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """Return a function compiled once for tensors of any size, or for each size it meets."""
    return torch.compile(function, dynamic=dynamic)


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works here: it needs Triton, or on a CPU a C++ compiler."""
    try:
        torch.compile(torch.relu)(torch.zeros(8, device=device))
    except Exception:  # each missing part has an exception of its own
        return False
    return True
