"""transformers.js on ONNX Runtime's Node.js library, as a backend.

Tested with @huggingface/transformers 4.3.2 and onnx 1.23.2 (``npm install --ignore-scripts
@huggingface/transformers``, ``pip install onnx``; 600 MB). It runs graphs that are exported
elsewhere: here that of onnx_graph.py, under the names of an exported Llama's inputs and outputs.
``Port`` is ``forward`` with its position_ids and DynamicCache; ``Generate`` is ``generate``, whose
tokens a LogitsProcessor forces, and which makes the masks and positions of its steps itself.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from reference_np.limits import Limits, real_tokens
from reference_np.ops import rope_frequencies

from . import onnx_graph
from .node import Node, packed, unpacked

REQUIRES = ("onnx==1.23.2",)
NPM = ("@huggingface/transformers@4.3.2",)
OBJECTS = ("Port", "Generate")
NODE = Node("transformers_js.cjs")


class Exported(onnx_graph.Standard):
    """The graph under the names that an exported Llama has, and the nodes before it."""

    def export(self, config: Any, params: Any) -> onnx.ModelProto:
        """Return the graph of input_ids, attention_mask, position_ids and the cache."""
        dtype = params["model.embed_tokens.weight"].dtype
        rows, one = np.zeros((1, 1), np.int64), np.ones((1, 1, 1), bool)
        past = {f"past{part}{i}": rows for i in range(config.n_layers) for part in "kv"}
        given = {"tokens": rows, **self.inputs(config, dtype, rows, one), **past}
        model = self.model(config, params, given)
        graph = model.graph
        parts = {"k": "key", "v": "value"}
        names = {"tokens": "input_ids", "out": "logits"}
        for i in range(config.n_layers):
            for part, word in parts.items():
                names[f"past{part}{i}"] = f"past_key_values.{i}.{word}"
                names[f"new{part}{i}"] = f"present.{i}.{word}"
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for output in graph.output:
            output.name = names[output.name]
        kept = [names[name] for name in past]
        shape = ["batch_size", config.n_kv_heads, "past_sequence_length", config.head_dim]
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        inputs = {name: (TensorProto.INT64, ["batch_size", axis]) for name, axis in IDS.items()}
        inputs |= dict.fromkeys(kept, (kind, shape))
        del graph.input[:]
        graph.input.extend(
            helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()
        )
        before = beginning(config, dtype)
        nodes = [*before.nodes, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(before.weights)
        return model


IDS = {
    "input_ids": "sequence_length",
    "attention_mask": "total_sequence_length",
    "position_ids": "sequence_length",
}


def beginning(config: Any, dtype: Any) -> onnx_graph.Graph:
    """Return the nodes that make cos, sin and mask [B, 1, T, S] of the exported inputs."""

    class Named(onnx_graph.Graph):
        def weight(self, array: np.ndarray) -> str:
            self.weights.append(onnx.numpy_helper.from_array(array, f"b{len(self.weights)}"))
            return self.weights[-1].name

        def op(self, kind: str, *inputs: str, **given: Any) -> str:
            given.setdefault("outputs", [f"m{len(self.nodes)}"])
            return super().op(kind, *inputs, **given)

    graph = Named()
    angles = np.arange(config.max_seq_len)[:, None] * rope_frequencies(config)
    for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        graph.op("Gather", graph.weight(table.astype(dtype)), "position_ids", outputs=[name])
    zero, one = (graph.weight(np.array(i)) for i in (0, 1))
    total, length = (
        graph.op("Squeeze", graph.op("Shape", name, start=1, end=2))
        for name in ("attention_mask", "input_ids")
    )
    keys = graph.op("Range", zero, total, one)
    queries = graph.op("Range", graph.op("Sub", total, length), total, one)
    queries = graph.op("Unsqueeze", queries, graph.weight(np.array([1])))
    real = graph.op("Cast", "attention_mask", to=TensorProto.BOOL)
    real = graph.op("Unsqueeze", real, graph.weight(np.array([1, 2])))
    seen = graph.op("And", graph.op("LessOrEqual", keys, queries), real)
    graph.op("Or", seen, graph.op("Equal", keys, queries), outputs=["mask"])
    return graph


def load(config: Any, params: Any) -> None:
    """Have transformers.js read a folder with the model."""
    form = {
        "model_type": "llama",
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_size": config.dim,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    half = params["model.embed_tokens.weight"].dtype == np.float16
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(form))
        (Path(folder) / "onnx").mkdir()
        model = Exported().export(config, params)
        onnx.save(model, Path(folder) / "onnx" / f"model{'_fp16' if half else ''}.onnx")
        NODE("load", folder=folder, dtype="fp16" if half else "fp32")


class Port:
    """``forward``: masks of padded rows, any positions, and a cache that is a value."""

    dtypes = ("float32", "float16")
    limits = Limits(masks="padding", float32_epsilon=True)

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        load(config, params)
        total = tokens.shape[1] + (next(iter(cache.values())).shape[2] if cache else 0)
        real = np.ones((len(tokens), total), bool) if mask is None else real_tokens(mask)
        inputs = {"input_ids": tokens, "attention_mask": real.astype(np.int64)}
        if positions is not None:
            inputs["position_ids"] = positions
        past = cache and {name: packed(value) for name, value in cache.items()}
        given = {name: packed(value.astype(np.int64)) for name, value in inputs.items()}
        found = NODE("forward", inputs=given, past=past)
        logits = unpacked(found.pop("logits"))
        names = {name: name.replace("present", "past_key_values") for name in found}
        return logits, {names[name]: unpacked(value) for name, value in found.items()}

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.decode(config, params, tokens, positions, mask, None)[0]


class Generate:
    """``generate``: prompts padded on the left, continued with their cache."""

    dtypes = Port.dtypes
    limits = Limits(masks="causal", positions="consecutive", cache="engine", float32_epsilon=True)

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        return self._start(config, params, rows)[-1]

    def _start(self, config: Any, params: Any, rows: Sequence[Any]) -> list[Any]:
        load(config, params)
        longest = max(map(len, rows))
        ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
        real = [[int(i >= longest - len(row)) for i in range(longest)] for row in rows]
        return list(map(unpacked, NODE("start", tokens=ids.tolist(), real=real)))

    def append(self, tokens: Any) -> Any:
        return self._append(np.asarray(tokens))[-1]

    def _append(self, tokens: Any) -> list[Any]:
        return list(map(unpacked, NODE("append", tokens=tokens.tolist())))

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        first = self._start(config, params, tokens[:, :1])
        rest = self._append(tokens[:, 1:]) if tokens.shape[1] > 1 else []
        return np.stack([*first, *rest], axis=1)
