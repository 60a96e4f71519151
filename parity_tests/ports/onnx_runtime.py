"""ONNX Runtime on graphs that the adapter makes: of its own operators, and of ONNX's.

Tested with onnxruntime 1.32.0 and onnx 1.23.2 (``pip install onnxruntime onnx``; 240 MB).
``Port`` is the graph that onnxruntime-genai builds: GroupQueryAttention with its rotation and
cache, SimplifiedLayerNormalization. ``Standard`` has Attention, RotaryEmbedding and
RMSNormalization of ONNX 23. Weights are mapped; cosines and sines are made here, in float64.
"""

from typing import Any

import numpy as np
import onnxruntime

from reference_np.limits import Limits
from reference_np.ops import rope_frequencies

from . import onnx_graph
from .onnx_graph import MS, Graph

REQUIRES = ("onnxruntime==1.32.0", "onnx==1.23.2")
OBJECTS = ("Port", "Standard")


class Standard(onnx_graph.Standard):
    """Attention, RotaryEmbedding and RMSNormalization of ONNX."""

    def session(self, model: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        return onnxruntime.InferenceSession(model.SerializeToString(), options)


class Port(Standard):
    """GroupQueryAttention, which rotates, and SimplifiedLayerNormalization."""

    limits = Limits(
        masks="no later keys", positions="shifted", appended="one token", float32_epsilon=True
    )

    def norm(self, graph: Graph, x: str, weight: np.ndarray, eps: float) -> str:
        return graph.op("SimplifiedLayerNormalization", x, graph.weight(weight), epsilon=eps)

    def attention(self, graph: Graph, q: str, k: str, v: str, config: Any, layer: int) -> str:
        past, new = ([f"{kind}{part}{layer}" for part in "kv"] for kind in ("past", "new"))
        tables = ("lengths", "total", "cos", "sin", "positions", "bias")
        out = [f"attended{layer}", *new]
        heads = {"num_heads": config.n_heads, "kv_num_heads": config.n_kv_heads}
        options = heads | {"do_rotary": 1, "domain": MS}
        return graph.op("GroupQueryAttention", q, k, v, *past, *tables, outputs=out, **options)

    def inputs(self, config: Any, dtype: Any, positions: Any, mask: Any) -> dict[str, Any]:
        batch, _, total = mask.shape
        angles = np.arange(config.max_seq_len)[:, None] * rope_frequencies(config)
        lowest = np.finfo(dtype).min
        return {
            "lengths": np.full(batch, total - 1, np.int32),
            "total": np.array(total, np.int32),
            "cos": np.cos(angles).astype(dtype),
            "sin": np.sin(angles).astype(dtype),
            "positions": positions.astype(np.int64),
            "bias": np.where(mask, 0, lowest).astype(dtype)[:, None],
        }
