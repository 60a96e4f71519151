"""A Llama in a GGUF file as a lazy mapping: Hugging Face's names and order, one array at a time.

llama.cpp rotates the pairs (2i, 2i + 1) of a head, as Meta's code does; its files hold the rows of
the query and key matrices in that order. In Hugging Face's the pairs are (i, i + K / 2).

Axes: H heads, K head_dim, D dim.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

import reference_np.config
from llama_common.errors import InputError
from reference_np.checkpoint import describe_mismatch
from reference_np.config import LlamaConfig
from reference_np.naming import named_shapes
from reference_np.ops import Array

from .gguf_config import ROPE_FREQS, read_config
from .gguf_file import GgufFile, StoredTensor

# Hugging Face's names -> llama.cpp's, of a whole model and below one layer.
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OURS = {theirs: ours for ours, theirs in LAYER.items()}
OUTER_OURS = {theirs: ours for ours, theirs in OUTER.items()}
IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,9})\.(.*)", re.DOTALL)
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", (32,))])


def gguf_name(name: str) -> str:
    """Translate a parameter's Hugging Face name into llama.cpp's."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}"


def hf_name(name: str) -> str:
    """Translate llama.cpp's name into Hugging Face's; one of no parameter gets quotes."""
    found = IN_LAYER.fullmatch(name)
    if found and found[2] in OURS:
        return f"model.layers.{found[1]}.{OURS[found[2]]}"
    return OUTER_OURS.get(name, repr(name))  # a parameter's own name is none of GGUF's


def interleaved(matrix: Array, n_heads: int) -> Array:
    """Return a matrix [H K, D] whose rows (i, i + K / 2) of each head are (2i, 2i + 1)."""
    return matrix.reshape(n_heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def halved(matrix: Array, n_heads: int) -> Array:
    """Return a matrix [H K, D] whose rows (2i, 2i + 1) of each head are (i, i + K / 2)."""
    return matrix.reshape(n_heads, -1, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def rotary_heads(name: str, config: LlamaConfig) -> int:
    """Return the number of heads of a query or key matrix, 0 for any other parameter."""
    if name.endswith("q_proj.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("k_proj.weight") else 0


def dequantised(content: Array, tensor: StoredTensor) -> Array:
    """Return a tensor of its bytes: float32, float16 or bfloat16; Q8_0 is exact in float32."""
    if tensor.type.name == "Q8_0":
        blocks = content.view(Q8_0)
        # A scale of 11 bits by 8 bits: the product has room in float32's 24.
        with np.errstate(invalid="ignore"):  # of infinite scales
            values = blocks["scale"].astype(np.float32)[:, None] * blocks["values"]
        return values.reshape(tensor.shape)
    dtypes: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
    return content.view(dtypes[tensor.type.name]).reshape(tensor.shape)


class GgufCheckpoint(Mapping[str, Array]):
    """Parameters of one GGUF file of a Llama, read one at a time, as reference_np's Checkpoint.

    Every access reads the tensor from disk and converts it to ``dtype`` (float32 or float64).
    ``hf`` has the keys of a config.json. Raises InputError for a file that is missing, truncated
    or of another kind, another architecture or quantisation, and for tensors that are missing,
    extra or misshapen (all named at once).
    """

    def __init__(self, path: str | Path, dtype: DTypeLike = np.float32) -> None:
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self.file = GgufFile(self.path)
        try:
            self.hf = read_config(self.file, self._rope_freqs())
            self.config = LlamaConfig.from_hf(self.hf, str(self.path))
        except reference_np.config.InputError as error:
            raise InputError(str(error)) from None
        tensors = {hf_name(name): t for name, t in self.file.tensors.items() if name != ROPE_FREQS}
        if problems := describe_mismatch(self.config, {n: t.shape for n, t in tensors.items()}):
            raise InputError(f"{self.path}: does not fit its metadata: {'; '.join(problems)}")
        self._tensors = {name: tensors[name] for name, _ in named_shapes(self.config)}

    def __getitem__(self, name: str) -> Array:
        return self.stored(name).astype(self.dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> list[Path]:
        """The file that the tensors are read from."""
        return [self.path]

    def entry(self, name: str) -> StoredTensor:
        """Return a parameter's shape, type and place in the file."""
        return self._tensors[name]

    def stored(self, name: str) -> Array:
        """Return a parameter in the precision that it is stored in; of Q8_0, in float32."""
        tensor = self._tensors[name]
        array = dequantised(self.file.read(gguf_name(name)), tensor)
        n_heads = rotary_heads(name, self.config)
        return halved(array, n_heads) if n_heads else array

    def _rope_freqs(self) -> Array | None:
        """Return the divisors of the rotary frequencies, which every converter stores as F32."""
        tensor = self.file.tensors.get(ROPE_FREQS)
        if tensor is None:
            return None
        if tensor.type.name != "F32" or len(tensor.shape) != 1:
            raise InputError(f"{self.path}: {ROPE_FREQS} is no vector of F32; convert it anew")
        found = dequantised(self.file.read(ROPE_FREQS), tensor)
        if not np.all(np.isfinite(found) & (found > 0)):
            raise InputError(f"{self.path}: {ROPE_FREQS} is not positive; convert it anew")
        return found
