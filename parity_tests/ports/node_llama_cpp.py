"""node-llama-cpp, llama.cpp in Node.js, an engine that owns its cache and reads a GGUF file.

Tested with node-llama-cpp 3.22.1 and gguf 0.19.0 (``npm install --ignore-scripts node-llama-cpp``,
``pip install gguf``; 750 MB, most of it for GPUs). Its raw logits come of ``controlledEvaluate``.
Cache and weights are float32 and flash attention is off, as in llama_cpp.py.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference_np.limits import Limits

from .gguf_file import write
from .node import Node, unpacked

REQUIRES = ("gguf==0.19.0",)
NPM = ("node-llama-cpp@3.22.1",)
NODE = Node("node_llama_cpp.cjs")


class Port:
    """``LlamaContextSequence``, one for each row."""

    dtypes = ("float32",)
    limits = Limits(
        masks="causal",
        positions="consecutive",
        cache="engine",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def _start(self, config: Any, params: Any, rows: Sequence[Any]) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "model.gguf")
            write(file, config, params, has_words=True, tokenizer="gpt2")
            NODE("load", file=file, rows=len(rows), vocab=config.vocab_size)
        return self._append(rows)

    def _append(self, rows: Sequence[Any]) -> list[Any]:
        """Append tokens to every sequence; return the logits [T, V] of each."""
        return list(map(unpacked, NODE("append", rows=[row.tolist() for row in rows])))

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return np.stack(self._start(config, params, tokens))

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        return np.stack([logits[-1] for logits in self._start(config, params, rows)])

    def append(self, tokens: Any) -> Any:
        return np.stack([logits[-1] for logits in self._append(tokens)])
