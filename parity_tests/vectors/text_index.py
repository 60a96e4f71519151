"""The index as lines of words, for readers without a JSON parser: what a forward pass needs.

Each file offset counts from the file's first byte; numbers are little-endian, row-major.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reference_np.config import LlamaConfig

from .files import safetensors_header
from .folder import FORMAT, SCHEMA_VERSION


def text_index(folder: Path, index: Mapping[str, Any]) -> str:
    """Return the lines of every model and every case that has calls."""
    lines = [f"{FORMAT} {SCHEMA_VERSION}"]
    for name, model in index["models"].items():
        lines += _model(folder, name, model)
    for case in index["cases"]:
        if case["kind"] != "training":
            lines += _case(folder, case)
    return "\n".join([*lines, "end"]) + "\n"


def _model(folder: Path, name: str, model: Mapping[str, Any]) -> Iterator[str]:
    c = LlamaConfig.from_hf(model["config"])
    sizes = c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.hidden_dim, c.vocab_size
    rope = c.rope_type, c.rope_factor, c.rope_low_freq_factor, c.rope_high_freq_factor
    numbers = *sizes, c.norm_eps, c.rope_theta, int(c.tie_embeddings)
    words = *numbers, *rope, c.rope_original_max_seq_len
    yield f"model {name} {model['weights']} {' '.join(map(str, words))}"
    header, start = safetensors_header(folder / model["weights"])
    for key, entry in header.items():
        if key != "__metadata__":
            count = math.prod(entry["shape"])
            yield f"weight {key} {start + entry['data_offsets'][0]} {count}"


def _case(folder: Path, case: Mapping[str, Any]) -> Iterator[str]:
    yield f"case {case['id']} {case['model']} {case['trace']}"
    header, start = safetensors_header(folder / case["trace"])
    calls = LlamaCalls(header)
    for c, (after, real) in enumerate(zip(calls.after, case["real"], strict=True)):
        rows, length = header[f"call.{c}.tokens"]["shape"]
        inputs = "tokens", "positions", "mask", "logits"
        offsets = [calls.offset(c, name, start) for name in inputs]
        ranges = real or [[0, length]] * rows
        bounds = case["bounds"][f"call.{c}.logits"]
        words = after, calls.cached(c), rows, length, *offsets, *bounds
        yield f"call {' '.join(map(str, words))}"
        yield f"real {' '.join(f'{first} {end}' for first, end in ranges)}"


class LlamaCalls:
    """The calls of a trace: which each continues (-1: none), and where its tensors lie."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        calls = json.loads(header["__metadata__"]["calls"])
        self.after = [-1 if call["after"] is None else call["after"] for call in calls]
        self._header = header

    def cached(self, call: int) -> int:
        """Return how many tokens of a row the calls have that this one continues."""
        before = self.after[call]
        if before < 0:
            return 0
        return self.cached(before) + int(self._header[f"call.{before}.tokens"]["shape"][1])

    def offset(self, call: int, name: str, start: int) -> int:
        """Return a tensor's place in the file, -1 where it is not there."""
        entry = self._header.get(f"call.{call}.{name}")
        return -1 if entry is None else start + int(entry["data_offsets"][0])
