"""keras-hub's Llama on TensorFlow, as a backend.

Tested with keras-hub 0.32.0, keras 3.15.1 and the TensorFlow that keras-hub depends on
(``pip install keras-hub keras``; 2.5 GB). The adapter is that of keras_hub.py; ``KERAS_BACKEND``
chooses the framework.
"""

from .keras_hub import Directory, DirectoryWithEpsilon, Linear, Port

REQUIRES = ("keras-hub==0.32.0", "keras==3.15.1")
VARIABLES = {"KERAS_BACKEND": "tensorflow"}
OBJECTS = ("Port", "Linear", "Directory", "DirectoryWithEpsilon")

__all__ = ["Directory", "DirectoryWithEpsilon", "Linear", "Port"]
