"""Write our weights in llama.cpp's file format, and decode with llama.cpp.

Needs ``llama-cpp-python`` and ``gguf``. llama.cpp's C interface is called directly, once a token,
so that none of the binding's Python is timed.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_parity.conversion.gguf_model import write_gguf
from llama_parity.conversion.lazy_weights import Model, Weight
from llama_torch.model.llama import Llama

MICRO_BATCH = 512  # prompt tokens that llama.cpp computes at once; its own default


def write_peers_model(path: Path, model: Llama) -> None:
    """Write the model as a GGUF file of the llama architecture, without a vocabulary."""
    weights = {
        name: Weight(tuple(tensor.shape), tensor.dtype, tensor.cpu)
        for name, tensor in model.state_dict().items()
    }
    without = {"tokenizer.ggml.model": "none"}
    write_gguf(path, Model(model.config, weights), model.head_weight.dtype, without)


class LlamaCpp:
    """Runs a GGUF model in llama.cpp, on torch's number of threads, with a float32 cache.

    ``flash`` selects its fused attention, faster for a prompt and slower for one token. It rounds
    to half precision inside: logits err by 1e-4 of the largest, without it by 1e-6.
    """

    def __init__(self, path: Path, length: int, flash: bool) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        # Kept on self, since the library calls it whenever it logs.
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = length
        settings.n_batch = length
        settings.n_ubatch = MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.flash_attn_type = int(flash)
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp does not load the model written for it")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Run the next tokens of the sequence; return a view of the last one's logits [V]."""
        ids = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama.cpp failed to decode")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))

    def prefill(self, prompt: Sequence[int]) -> np.ndarray:
        """Clear the cache, run a prompt and return its last logits [V]."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        return self.logits(prompt)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Return ``new_tokens`` greedily decoded token ids after a prompt."""
        tokens = [int(self.prefill(prompt).argmax())]
        while len(tokens) < new_tokens:
            tokens.append(int(self.logits(tokens[-1:]).argmax()))
        return tokens

    def close(self) -> None:
        """Free the context and the model."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@contextmanager
def llama_cpp_peer(model: Llama, flash: bool) -> Iterator[LlamaCpp | None]:
    """Yield llama.cpp with the same weights, or None where it is not installed."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_peers_model(path, model)
        peer = LlamaCpp(path, model.config.max_seq_len, flash)
        try:
            yield peer
        finally:
            peer.close()
