"""A Llama's graph of ONNX's own operators, which onnx_runtime, onnx_reference and openvino run.

Attention, RotaryEmbedding and RMSNormalization are those of ONNX 23. Weights are mapped; cosines
and sines are made here, in float64.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reference_np.limits import Limits
from reference_np.ops import rope_frequencies

MS = "com.microsoft"


class Graph:
    """The nodes and initializers of a model under construction."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        named = list(outputs) or [f"n{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, named, **attributes))
        return named[0]

    def linear(self, x: str, weight: np.ndarray) -> str:
        return self.op("MatMul", x, self.weight(weight.T))


class Standard:
    """Attention, RotaryEmbedding and RMSNormalization of ONNX; ``session`` runs the graph."""

    dtypes: tuple[str, ...] = ("float32", "float16")
    limits = Limits(float32_epsilon=True)

    def session(self, model: onnx.ModelProto) -> Any:
        """Return an object whose ``run(None, inputs)`` has the outputs of the graph."""
        raise NotImplementedError("session")

    def shape(self, value: np.ndarray) -> list[int | None]:
        """Return the shape of an input that the graph declares; None: of any length."""
        return [None] * value.ndim

    def norm(self, graph: Graph, x: str, weight: np.ndarray, eps: float) -> str:
        return graph.op("RMSNormalization", x, graph.weight(weight), epsilon=eps)

    def attention(self, graph: Graph, q: str, k: str, v: str, config: Any, layer: int) -> str:
        heads = {"q_num_heads": config.n_heads, "kv_num_heads": config.n_kv_heads}
        q, k = (
            graph.op("RotaryEmbedding", x, "cos", "sin", num_heads=n)
            for x, n in ((q, config.n_heads), (k, config.n_kv_heads))
        )
        past, new = ([f"{kind}{part}{layer}" for part in "kv"] for kind in ("past", "new"))
        out = [f"attended{layer}", *new]
        return graph.op("Attention", q, k, v, "mask", *past, outputs=out, **heads)

    def inputs(self, config: Any, dtype: Any, positions: Any, mask: Any) -> dict[str, Any]:
        angles = positions[..., None] * rope_frequencies(config)
        tables = {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}
        return {**tables, "mask": mask[:, None]}

    def model(self, config: Any, params: Any, inputs: dict[str, Any]) -> onnx.ModelProto:
        """Return the model as a graph; ``inputs`` have the names, types and ranks."""
        graph, names = Graph(), []
        embed = params["model.embed_tokens.weight"]
        x = graph.op("Gather", graph.weight(embed), "tokens")
        for i in range(config.n_layers):
            own = {n.split(".", 3)[3]: v for n, v in params.items() if f"layers.{i}." in n}
            h = self.norm(graph, x, own["input_layernorm.weight"], config.norm_eps)
            q, k, v = (graph.linear(h, own[f"self_attn.{n}_proj.weight"]) for n in "qkv")
            mixed = self.attention(graph, q, k, v, config, i)
            x = graph.op("Add", x, graph.linear(mixed, own["self_attn.o_proj.weight"]))
            h = self.norm(graph, x, own["post_attention_layernorm.weight"], config.norm_eps)
            gate, up = (graph.linear(h, own[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
            gate = graph.op("Mul", gate, graph.op("Sigmoid", gate))
            hidden = graph.op("Mul", gate, up)
            x = graph.op("Add", x, graph.linear(hidden, own["mlp.down_proj.weight"]))
            names += [f"newk{i}", f"newv{i}"]
        x = self.norm(graph, x, params["model.norm.weight"], config.norm_eps)
        graph.op("MatMul", x, graph.weight(params.get("lm_head.weight", embed).T), outputs=["out"])
        kind = helper.np_dtype_to_tensor_dtype(embed.dtype)
        given = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), self.shape(value)
            )
            for name, value in inputs.items()
        ]
        results = [helper.make_tensor_value_info(name, kind, None) for name in ("out", *names)]
        body = helper.make_graph(graph.nodes, "llama", given, results, graph.weights)
        versions = [helper.make_opsetid("", 23), helper.make_opsetid(MS, 1)]
        return helper.make_model(body, opset_imports=versions, ir_version=11)

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        dtype = params["model.embed_tokens.weight"].dtype
        batch, length = tokens.shape
        empty = np.zeros((batch, config.n_kv_heads, 0, config.head_dim), dtype)
        past = cache or [empty] * (2 * config.n_layers)
        start = past[0].shape[2]
        if positions is None:
            positions = np.tile(start + np.arange(length), (batch, 1))
        if mask is None:
            mask = np.tri(length, start + length, start, dtype=bool)[None].repeat(batch, 0)
        names = [f"past{part}{i}" for i in range(config.n_layers) for part in "kv"]
        inputs = {"tokens": tokens, **self.inputs(config, dtype, positions, mask)}
        inputs |= dict(zip(names, past, strict=True))
        session = self.session(self.model(config, params, inputs))
        logits, *new = session.run(None, inputs)
        return logits, new

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.decode(config, params, tokens, positions, mask, None)[0]
