"""The project's readers of model directories as ports: its loader with the tokenizer, and GGUF."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_parity.conversion.gguf_checkpoint import GgufCheckpoint
from llama_parity.conversion.gguf_conversion import to_gguf
from llama_torch import load
from reference_np.limits import Limits
from reference_np.model import forward
from reference_np.ops import Array


class Loaded:
    """``llama_torch.load``, which reads the tokenizer too."""

    dtypes = ("float32", "bfloat16")

    def from_directory(self, path: str, dtype: Any) -> Callable[[Array], Array]:
        model = load(path, dtype=dtype, device="cpu").model

        def logits(tokens: Array) -> Array:
            with torch.no_grad():
                return model(torch.from_numpy(tokens))[0].float().numpy()

        return logits


class ByGguf:
    """The oracle on the GGUF file that a directory is converted to."""

    dtypes = ("float32",)
    limits = Limits(float32_epsilon=True)

    def from_directory(self, path: str, dtype: str) -> Callable[[Array], Array]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            to_gguf(Path(path), file, None, -1, ())
            checkpoint = GgufCheckpoint(file)
            config = checkpoint.config
            params = {name: checkpoint[name].astype(dtype) for name in checkpoint}
        return lambda tokens: forward(params, tokens, config)[0]
