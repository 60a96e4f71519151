"""Penzai's Llama on JAX with a CUDA device.

Tested with penzai 0.2.5 and jax 0.11.2 of that machine (``--python python3``). JAX rounds a float32
product on such a device to TensorFloat32 unless told otherwise: ``Port`` asks for float32.
"""

import jax

from . import penzai

REQUIRES = ("penzai==0.2.5", "jax==0.11.2")
MINUTES = 8.0  # compiling
NEEDS_GPU = True


class Port(penzai.Port):
    """``TransformerLM`` and ``KVCachingTransformerLM``, with products of full precision."""

    def __init__(self) -> None:
        if jax.default_backend() != "gpu":
            raise RuntimeError("JAX has no CUDA device")
        jax.config.update("jax_default_matmul_precision", "highest")
