"""What runs between a token and the next one's logits, and how that is chosen.

Five ways, all on a StaticCache:

eager     the model as it stands, on the columns written so far. Any device, any batch.
numpy     one sequence on the CPU through NumPy, whose products of one row are quicker.
graph     the model on the whole room, captured once in a CUDA graph and replayed.
compiled  the same, its blocks compiled by torch.compile first: seconds, cached on disk.
kernels   up to 64 sequences on a GPU as the project's own Triton kernels, captured likewise.
"""

import importlib

import torch

from ..common.errors import InputError
from ..model.llama import Llama
from .config import Decoding
from .numpy_step import NumpyStep

SHORT = 32  # tokens that are not worth the preparation of a graph

TRITON = (3, 6)  # the oldest that compiles the kernels; torch 2.11 has it

MOST_ROWS = 64  # of the kernels: the products of more are not bound by reading the weights


def choose(way: Decoding, model: Llama, rows: int, n_tokens: int) -> Decoding:
    """Return how to continue ``rows`` sequences by ``n_tokens`` tokens; InputError if it cannot."""
    weight = model.model.embed_tokens.weight
    on_gpu = weight.device.type == "cuda"
    has_kernels = on_gpu and rows <= MOST_ROWS and _has_kernels()
    # A batch needs tensor cores that take its precision through Triton, or torch's are quicker.
    has_cores = (
        weight.itemsize == 2 and on_gpu and torch.cuda.get_device_capability(weight.device) >= (8,)
    )
    has_numpy = rows == 1 and NumpyStep.supports(model)
    if way == "auto":
        if not on_gpu:
            # NumPy's products are one thread's: with more, torch's are quicker.
            return "numpy" if has_numpy and torch.get_num_threads() <= 2 else "eager"
        if n_tokens < SHORT:
            return "eager"
        return "kernels" if has_kernels and (rows == 1 or has_cores) else "graph"
    if way in ("graph", "compiled", "kernels") and not on_gpu:
        raise InputError(f"--decoding {way} needs a GPU; leave the flag out")
    if way == "kernels" and not has_kernels:
        raise InputError(
            f"--decoding kernels is for at most {MOST_ROWS} prompts and needs an NVIDIA GPU and "
            f"triton {'.'.join(map(str, TRITON))}; use graph"
        )
    if way == "numpy" and not has_numpy:
        raise InputError(
            "--decoding numpy is for one prompt on the CPU in float32 or float64; use eager"
        )
    return way


def _has_kernels() -> bool:
    if torch.version.hip is not None:
        return False
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return False  # it comes with torch's CUDA builds alone
    return tuple(map(int, triton.__version__.split(".")[:2])) >= TRITON
