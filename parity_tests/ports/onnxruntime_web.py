"""ONNX Runtime Web, WebAssembly in Node.js, on the graphs that onnx_runtime builds, as a backend.

Tested with onnxruntime-web 1.30.0 and onnx 1.23.2 (``npm install --ignore-scripts
onnxruntime-web``, ``pip install onnx onnxruntime``; 400 MB).
"""

from typing import Any

import numpy as np

from . import onnx_runtime
from .node import Node, packed, unpacked

REQUIRES = ("onnx==1.23.2", "onnxruntime==1.32.0")
NPM = ("onnxruntime-web@1.30.0",)
OBJECTS = ("Port", "Standard")
NODE = Node("onnxruntime_web.cjs")


class Session:
    """A session of the Node.js process, run once."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        """Return the outputs of the graph."""
        model = packed(np.frombuffer(self.model.SerializeToString(), np.uint8))
        given = {name: packed(value) for name, value in inputs.items()}
        found = NODE("run", model=model, inputs=given)
        return [unpacked(found[output.name]) for output in self.model.graph.output]


class Standard(onnx_runtime.Standard):
    """Attention, RotaryEmbedding and RMSNormalization of ONNX."""

    def session(self, model: Any) -> Any:
        return Session(model)


class Port(onnx_runtime.Port):
    """GroupQueryAttention, which rotates, and SimplifiedLayerNormalization."""

    def session(self, model: Any) -> Any:
        return Session(model)
