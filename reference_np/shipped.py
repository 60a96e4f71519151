"""The backends of this repository by their short names, and the remedy where one is not had."""

import difflib
import sys

# Short names of the backends in this repository; any other is package.module:object.
SHIPPED = {
    "torch": "parity_tests.backends.torch_backends:eager",
    "torch-math": "parity_tests.backends.torch_backends:math",
    "torch-flash": "parity_tests.backends.torch_backends:flash",
    "torch-static": "parity_tests.backends.decoding_backends:static",
    "torch-numpy": "parity_tests.backends.decoding_backends:numpy_step",
    "torch-int8": "parity_tests.backends.decoding_backends:int8",
    "torch-compile": "parity_tests.backends.torch_backends:compiled",
    "transformers": "parity_tests.backends.transformers_backend:backend",
    "jax": "parity_tests.backends.jax_backend:backend",
    "cuda": "parity_tests.backends.torch_backends:cuda",
    "cuda-math": "parity_tests.backends.torch_backends:cuda_math",
    "cuda-flash": "parity_tests.backends.torch_backends:cuda_flash",
    "cuda-efficient": "parity_tests.backends.torch_backends:cuda_efficient",
    "cuda-compile": "parity_tests.backends.torch_backends:cuda_compiled",
    "cuda-static": "parity_tests.backends.decoding_backends:cuda_static",
    "cuda-kernels": "parity_tests.backends.decoding_backends:cuda_kernels",
    "cuda-kernels-int8": "parity_tests.backends.decoding_backends:cuda_kernels_int8",
    "cuda-batch-kernels": "parity_tests.backends.decoding_backends:cuda_batch_kernels",
    "cuda-batch-kernels-int8": "parity_tests.backends.decoding_backends:cuda_batch_kernels_int8",
    "cuda-graph": "parity_tests.backends.decoding_backends:cuda_graph",
    "cuda-graph-compile": "parity_tests.backends.decoding_backends:cuda_graph_compiled",
}


# The extra of pyproject.toml that brings a shipped backend's package.
EXTRAS = {"jax": "jax", "transformers": "test"}


def remedy_of(spec: str, error: BaseException) -> str:
    """Return what to do about the error of importing a backend."""
    if spec in SHIPPED:
        extra = EXTRAS.get(spec, "torch")
        return f"pip install 'llama-parity[{extra}]' (or -e '.[{extra}]') brings what it needs"
    if ":" not in spec:
        return f"give package.module:object or one of {', '.join(SHIPPED)}"
    module_name, _, path = spec.partition(":")
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        return "the module must be installed or lie in the current folder"
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, which it needs, into this environment"
    if isinstance(error, AttributeError) and module_name in sys.modules:
        near = difflib.get_close_matches(path, dir(sys.modules[module_name]), 1)
        return f"did you mean {module_name}:{near[0]}?" if near else "it has no such object"
    return "its module failed while it was imported"
