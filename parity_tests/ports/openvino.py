"""OpenVINO on a graph that the adapter makes of ONNX's operators, as a backend.

Tested with openvino 2026.4.1 and onnx 1.23.2 (``pip install openvino onnx``; 330 MB). The graph is
onnx_graph's, read by OpenVINO's ONNX frontend with the shapes of each call, and computed by its CPU
plugin in float32, whatever the type of the weights.
"""

from typing import Any

import numpy as np
import openvino as ov

from . import onnx_graph

REQUIRES = ("openvino==2026.4.1", "onnx==1.23.2")
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


class Compiled:
    """A model compiled for the processor, called as a session of ONNX Runtime is."""

    def __init__(self, model: Any) -> None:
        self.model = ov.compile_model(model, "CPU", OPTIONS)

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        found = self.model(inputs)
        return [np.array(found[output]) for output in self.model.outputs]


class Port(onnx_graph.Standard):
    """``Core.read_model`` and ``compile_model``; its frontend wants known shapes."""

    def shape(self, value: np.ndarray) -> list[int | None]:
        return list(value.shape)

    def session(self, model: Any) -> Compiled:
        return Compiled(ov.Core().read_model(model.SerializeToString()))
