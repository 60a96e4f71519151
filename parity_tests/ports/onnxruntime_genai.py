"""ONNX Runtime GenAI with its own builder of graphs, an engine that owns its cache, as a backend.

Tested with onnxruntime-genai 0.18.0 and onnxruntime 1.32.0 (``pip install onnxruntime-genai
onnxruntime onnx transformers==5.23.0 torch==2.13.0``; 1.5 GB, most of it for the builder). The
builder reads a Hugging Face directory; the port writes one for its weights. The context is short,
since the builder writes cosines and sines of every position into the graph.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import transformers
from onnxruntime_genai.models.builder import create_model, parse_extra_options

from reference_np.limits import Limits

from ..conformance.directories import Form, write_directory

REQUIRES = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.32.0",
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(path: str) -> og.Model:
    """Build the graph of a Hugging Face directory and load it."""
    unheard = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(unheard),
        contextlib.redirect_stderr(unheard),
    ):
        given = ("", path, folder, "fp32", "cpu", folder)
        create_model(*given, **parse_extra_options(*given, []))
        return og.Model(folder)


def begun(model: og.Model, n_rows: int) -> og.Generator:
    settings = og.GeneratorParams(model)
    settings.set_search_options(batch_size=n_rows)
    return og.Generator(model, settings)


def append(generator: og.Generator, tokens: Any) -> Any:
    """Append tokens [B, T], once where B is not 1; return their logits [B, T, V]."""
    generator.append_tokens(tokens.astype(np.int32))
    return np.array(generator.get_output("logits"))


class Port:
    """The builder, and its engine; one Generator for each row that goes on."""

    dtypes = ("float32",)
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="engine",
        rope_types=("default", "llama3"),
        context=256,
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def model(self, config: Any, params: Any) -> og.Model:
        heights = {len(array) for name, array in params.items() if "layers" in name}
        if config.vocab_size in heights:  # Directory's cells show what comes of it
            raise NotImplementedError("a matrix of a layer has as many rows as the vocabulary")
        with tempfile.TemporaryDirectory() as folder:
            write_directory(Path(folder), config, params, Form())
            return load(folder)

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return append(begun(self.model(config, params), len(tokens)), tokens)

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        model = self.model(config, params)
        self.rows = [begun(model, 1) for _ in rows]
        return self.append(rows)

    def append(self, tokens: Sequence[Any]) -> Any:
        pairs = zip(self.rows, tokens, strict=True)
        return np.stack([append(row, new[None])[0, -1] for row, new in pairs])


class Directory:
    """The builder on a directory of Hugging Face."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        context=256,
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        model = load(path)
        return lambda tokens: append(begun(model, len(tokens)), tokens)
