"""The backends of this repository by their short names, and the extras that they need."""

# Short names of the backends in this repository; any other is
# package.module:object or FILE.py:object.
SHIPPED = {
    "torch": "parity_tests.backends.torch_backends:eager",
    "torch-math": "parity_tests.backends.torch_backends:math",
    "torch-flash": "parity_tests.backends.torch_backends:flash",
    "torch-static": "parity_tests.backends.decoding_backends:static",
    "torch-onednn": "parity_tests.backends.decoding_backends:onednn",
    "torch-numpy": "parity_tests.backends.decoding_backends:numpy_step",
    "torch-native": "parity_tests.backends.decoding_backends:native_step",
    "torch-int8": "parity_tests.backends.decoding_backends:int8",
    "torch-int4": "parity_tests.backends.decoding_backends:int4",
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
