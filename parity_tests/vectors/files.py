"""Write safetensors and GGUF files whose bytes depend on their contents alone."""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_parity.conversion.gguf_checkpoint import gguf_name, interleaved, rotary_heads
from llama_parity.conversion.gguf_config import ROPE_FREQS, stored_metadata
from reference_np.config import LlamaConfig
from reference_np.ops import Array

from .arithmetic import rope_frequencies

GGUF_VERSION, ALIGNMENT, F32 = 3, 32, 0
# What llama.cpp needs besides: an architecture, and that there is no tokenizer.
GENERAL = {"general.architecture": "llama", "tokenizer.ggml.model": "none"}


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str]) -> None:
    """Write float32 tensors in their order, the data at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(value, "<f4").tobytes() for value in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header, and where its data begins."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, 8 + length


def gguf_note(config: LlamaConfig) -> str | None:
    """Return how the model of a GGUF file differs, whose floats have 32 bits; None if exact."""
    notes = []
    if float(np.float32(config.norm_eps)) != config.norm_eps:
        notes.append(f"norm_eps {config.norm_eps!r} is stored as float32")
    if config.rope_type == "llama3":
        notes.append("what the rotary frequencies are divided by is stored as float32")
    return "; ".join(notes) or None


def write_gguf(path: Path, config: LlamaConfig, params: Mapping[str, Array]) -> None:
    """Write a GGUF file of float32 tensors, for llama.cpp and its kin; it has no tokenizer."""
    tensors = {gguf_name(name): _as_llama_cpp(name, p, config) for name, p in params.items()}
    if config.rope_type == "llama3":
        tensors = {ROPE_FREQS: divisors(config), **tensors}
    metadata = {**GENERAL, **stored_metadata(config)}
    parts = [b"GGUF", struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, value in tensors.items():
        shape = value.shape[::-1]
        parts += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts += [struct.pack("<IQ", F32, offset)]
        offset += value.nbytes + -value.nbytes % ALIGNMENT
    header = b"".join(parts)
    data = [header + bytes(-len(header) % ALIGNMENT)]
    data += [value.tobytes() + bytes(-value.nbytes % ALIGNMENT) for value in tensors.values()]
    path.write_bytes(b"".join(data))


def divisors(config: LlamaConfig) -> Array:
    """Return what the scaling divides each rotary frequency by, float32 [K / 2]."""
    plain = rope_frequencies(replace(config, rope_type="default"))
    pairs = zip(plain, rope_frequencies(config), strict=True)
    return np.array([float(one / scaled) for one, scaled in pairs], "<f4")


def _as_llama_cpp(name: str, value: Array, config: LlamaConfig) -> Array:
    heads = rotary_heads(name, config)
    return np.ascontiguousarray(interleaved(value, heads) if heads else value, "<f4")


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """Return a value with its type: 32-bit integer, 32-bit float or string."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)
