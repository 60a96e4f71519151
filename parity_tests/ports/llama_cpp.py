"""llama.cpp through llama-cpp-python, an engine that owns its cache and reads a GGUF file.

Tested with llama_cpp_python 0.3.36 and gguf 0.19.0
(``pip install llama_cpp_python gguf``; no wheel: it compiles for minutes). The file is written by
``gguf``, with q and k permuted as convert_hf_to_gguf does. Cache and weights are float32 and
flash attention is off: with it, or with the default float16 cache, logits err by 1e-4.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from reference_np.limits import Limits

from .gguf_file import write

REQUIRES = ("llama_cpp_python==0.3.36", "gguf==0.19.0")
LENGTH = 320  # positions of one sequence
QUIET = llama_cpp.llama_log_callback(lambda *_: None)


class Engine:
    """A model and a context of several sequences."""

    def __init__(self, config: Any, params: Any, n_rows: int) -> None:
        llama_cpp.llama_log_set(QUIET, None)
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            write(file.name, config, params)
            self.model = llama_cpp.llama_model_load_from_file(
                file.name.encode(), llama_cpp.llama_model_default_params()
            )
        if not self.model:
            raise ValueError("llama.cpp does not load the file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = LENGTH * n_rows, LENGTH * n_rows
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = n_rows, 1, 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size, self.lengths = config.vocab_size, [0] * n_rows

    def __del__(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def append(self, rows: Sequence[Any]) -> list[Any]:
        """Append tokens to every sequence; return the logits [T, V] of each."""
        count = sum(map(len, rows))
        batch, i = llama_cpp.llama_batch_init(count, 0, 1), 0
        for row, tokens in enumerate(rows):
            for token in tokens:
                batch.token[i], batch.pos[i] = int(token), self.lengths[row]
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, 1
                self.lengths[row], i = self.lengths[row] + 1, i + 1
        batch.n_tokens = count
        if llama_cpp.llama_decode(self.context, batch):
            raise ValueError("llama_decode failed")
        out = llama_cpp.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(out, (count, self.vocab_size)).copy()
        llama_cpp.llama_batch_free(batch)
        return np.split(logits, np.cumsum([len(row) for row in rows])[:-1])


class Port:
    """Sequences of a context, and their logits."""

    dtypes = ("float32",)
    limits = Limits(
        masks="causal",
        positions="shifted",
        cache="engine",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        engine = Engine(config, params, len(tokens))
        if positions is not None:
            engine.lengths = positions[:, 0].tolist()
        return np.stack(engine.append(tokens))

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        self.engine = Engine(config, params, len(rows))
        return self.append(rows)

    def append(self, tokens: Any) -> Any:
        return np.stack([logits[-1] for logits in self.engine.append(tokens)])
