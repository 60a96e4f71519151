"""Which device to run on, and which precision it computes natively."""

import torch

from .config import InputError


def pick_device(name: str) -> torch.device:
    """Return the asked-for device, or the best there is for ``auto``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name!r} is not one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())
