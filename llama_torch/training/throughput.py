"""Compute training's operations per token, the device's peak, and memory in use."""

import resource
import sys
import time

import torch

from ..common.device import computes_bfloat16
from ..model.config import ModelConfig

# bfloat16 tensor-core operations per second, dense, from NVIDIA's data sheets.
PEAK_BFLOAT16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def flops_per_token(config: ModelConfig, n_parameters: int, learnt: float = 1.0) -> float:
    """Return the operations of a training step for each token (Chowdhery et al. 2022, app. B).

    Six for each weight that multiplies, and attention over the whole context, masked or not;
    an embedding that is only looked up multiplies nothing. Recomputation does not count, nor do
    logits of tokens that are not learnt, ``learnt`` being the share of those that are.
    """
    head = config.vocab_size * config.dim
    looked_up = 0 if config.tie_embeddings else head
    queries = config.n_heads * config.head_dim
    attention = 12 * config.n_layers * queries * config.max_seq_len
    return 6.0 * (n_parameters - looked_up - (1.0 - learnt) * head) + attention


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return peak operations per second: a known GPU's, or of a matrix product timed here.

    A format that the device emulates has float32's peak: a step's products may be quicker than an
    emulated one.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_BFLOAT16.items():
            if part in name:
                return flops
    size = 8192 if device.type == "cuda" else 1024
    emulated = dtype == torch.bfloat16 and not computes_bfloat16(device)
    matrix = torch.randn(size, size, device=device).to(torch.float32 if emulated else dtype)
    seconds: list[float] = []
    # A slow CPU takes long for each; the first also loads the kernels.
    while len(seconds) < 2 or (len(seconds) < 12 and sum(seconds) < 1):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def peak_tokens_per_second(
    config: ModelConfig,
    n_parameters: int,
    device: torch.device,
    dtype: torch.dtype,
    learnt: float = 1.0,
) -> float:
    """Return the tokens per second of training at the device's peak: 100% MFU.

    ``learnt`` is flops_per_token's.
    """
    return peak_flops(device, dtype) / flops_per_token(config, n_parameters, learnt)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
