"""ONNX's reference evaluator on a graph that the adapter makes of ONNX's operators, as a backend.

Tested with onnx 1.23.2 (``pip install onnx``; 70 MB). The evaluator is the specification of the
operators in NumPy: Attention, RotaryEmbedding and RMSNormalization of ONNX 23.
"""

from typing import Any

from onnx.reference import ReferenceEvaluator

from . import onnx_graph

REQUIRES = ("onnx==1.23.2",)


class Port(onnx_graph.Standard):
    """``ReferenceEvaluator``."""

    dtypes = ("float32", "bfloat16", "float16")

    def session(self, model: Any) -> Any:
        return ReferenceEvaluator(model)
