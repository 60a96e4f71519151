"""keras-hub's Llama on PyTorch, as a backend.

Tested with keras-hub 0.32.0, keras 3.15.1 and torch 2.13.0
(``pip install keras-hub keras torch==2.13.0``; 3.5 GB, since keras-hub depends on TensorFlow). The
adapter is that of keras_hub.py; ``KERAS_BACKEND`` chooses the framework.
"""

from .keras_hub import Directory, DirectoryWithEpsilon, Linear, Port

REQUIRES = ("keras-hub==0.32.0", "keras==3.15.1", "torch==2.13.0")
VARIABLES = {"KERAS_BACKEND": "torch"}
OBJECTS = ("Port", "Linear", "Directory", "DirectoryWithEpsilon")

__all__ = ["Directory", "DirectoryWithEpsilon", "Linear", "Port"]
