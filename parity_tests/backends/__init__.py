"""Backends of this repository's implementations; reference_np/backend.py has the protocol."""

from reference_np.backend import SHIPPED

CUDA = tuple(name for name in SHIPPED if name.startswith("cuda"))

# Not run by default: these compile every new shape for seconds, and jax is an extra.
SLOW = (
    "torch-compile",
    "cuda-compile",
    "cuda-graph-compile",
    "cuda-kernels",
    "cuda-kernels-int8",
    "cuda-batch-kernels",
    "cuda-batch-kernels-int8",
    "jax",
)

DEFAULT = tuple(name for name in SHIPPED if name not in SLOW)

# Those that read a model directory by their own loader, of the default ones.
WITH_LOADER = ("torch", "transformers")
