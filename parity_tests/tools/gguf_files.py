"""GGUF files by ggml's own package, as llama.cpp's converter writes them."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_parity.conversion.gguf_checkpoint import gguf_name, interleaved
from llama_parity.conversion.gguf_config import divisors
from reference_np.config import LlamaConfig

from ..conformance.strategies import random_params


def write_as_llama_cpp(
    path: Path,
    config: LlamaConfig,
    params: dict[str, np.ndarray],
    kind: str = "F32",
    **changed: Any,
) -> Path:
    """Write what llama.cpp's converter does, by its package: the keys it has, and no more.

    ``changed`` replaces keys below ``llama.``, or leaves them out (None).
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    keys = {
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    if config.rope_type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_factor}
    for key, value in (keys | changed).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"llama.{key}", value)
    if config.rope_type == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config).astype(np.float32))
    for name, value in params.items():
        heads = config.n_heads if "q_proj" in name else config.n_kv_heads
        array = interleaved(value, heads) if "q_proj" in name or "k_proj" in name else value
        array = np.ascontiguousarray(array, dtype=np.float32)
        raw = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quantize(array, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(path: Path, config: LlamaConfig, **changed: Any) -> Path:
    """Write a file of a small vocabulary by ggml's package, with changed keys of the tokenizer."""
    import gguf

    plain = write_as_llama_cpp(path.with_suffix(".plain"), config, random_params(config, 0))
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.arch")):
            writer.add_key_value(name, field.contents(), field.types[0])
    keys: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "<s>", "c"]}
    for key, value in (keys | changed).items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}
        add |= {bool: writer.add_bool}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class ChangedKeys:
    """A GGUF file, to be written with some keys of its metadata changed, added or left out."""

    def __init__(self, path: Path) -> None:
        import gguf

        content = path.read_bytes()
        reader = gguf.GGUFReader(path)
        self.fields = {
            name: content[field.offset : field.offset + sum(part.nbytes for part in field.parts)]
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        start = 24 + sum(map(len, self.fields.values()))
        entry = reader.tensors[-1].field
        end = entry.offset + sum(part.nbytes for part in entry.parts)
        self.head, self.entries = content[:16], content[start:end]
        self.data = content[reader.data_offset :]

    def write(self, path: Path, changed: Mapping[str, Any]) -> Path:
        """Write the file; the value None leaves a key out. Lists hold values of one type."""
        new = {key: _of_text(key) + _typed(v) for key, v in changed.items() if v is not None}
        fields = {key: field for key, field in self.fields.items() if key not in changed} | new
        head = self.head + struct.pack("<Q", len(fields)) + b"".join(fields.values()) + self.entries
        path.write_bytes(head + bytes(-len(head) % 32) + self.data)
        return path


def _typed(value: Any) -> bytes:
    """Return a value as GGUF stores it, after the number of its type."""
    if isinstance(value, list):
        items = [_typed(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", 5)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + _joined(items)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _of_text(value)
    integer = (5, "i") if value < 0 else (4, "I")
    number, form = {bool: (7, "?"), float: (6, "f"), int: integer}[type(value)]
    return struct.pack(f"<I{form}", number, value)


def _joined(items: Sequence[bytes]) -> bytes:
    return b"".join(item[4:] for item in items)


def _of_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
