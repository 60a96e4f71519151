"""Optimum ONNX: its export of a Hugging Face directory, run by ONNX Runtime, with a cache.

Tested with optimum-onnx 0.1.0, onnxruntime 1.32.0 and transformers 4.57.6, the newest that it takes
(``pip install optimum-onnx onnxruntime torch==2.13.0``; 1.3 GB). ``ORTModelForCausalLM`` exports
the directory, which the port writes for its weights. The graph takes token mask, positions and
cache.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from optimum.onnxruntime import ORTModelForCausalLM

from reference_np.limits import Limits, real_tokens

from ..conformance.directories import Form, write_directory

REQUIRES = (
    "optimum-onnx==0.1.0",
    "optimum==2.1.0",
    "onnxruntime==1.32.0",
    "onnx==1.23.2",
    "transformers==4.57.6",
    "torch==2.13.0",
)
VARIABLES = {"HF_HUB_OFFLINE": "1"}
MINUTES = 20.0
transformers.logging.set_verbosity_error()


def load(path: str) -> Any:
    """Export a directory and make a session of it, with one thread."""
    options, unheard = onnxruntime.SessionOptions(), io.StringIO()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        return ORTModelForCausalLM.from_pretrained(path, export=True, session_options=options)


def to_torch(array: Any) -> Any:
    return torch.from_numpy(np.array(array)).long()


class Port:
    """Rows padded on either side, positions and a cache that is a value."""

    dtypes = ("float32",)
    example_fraction = 0.2
    limits = Limits(
        head_dim="dim / n_heads",
        masks="padding",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def logits(self, config: Any, params: Any, *inputs: Any) -> Any:
        return self.decode(config, params, *inputs, None)[0]

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        if cache is None:
            with tempfile.TemporaryDirectory() as folder:
                write_directory(Path(folder), config, params, Form(config="4"))
                cache = load(folder), None
        model, past = cache
        before = 0 if past is None else past[0][0].shape[2]
        real = (
            np.ones((len(tokens), before + tokens.shape[1])) if mask is None else real_tokens(mask)
        )
        found = model(
            to_torch(tokens),
            attention_mask=to_torch(real),
            position_ids=None if positions is None else to_torch(positions),
            past_key_values=past,
        )
        return found.logits.numpy(), (model, found.past_key_values)


class Directory:
    """``ORTModelForCausalLM.from_pretrained`` on a directory of Hugging Face."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        model = load(path)
        ones = np.ones_like
        return lambda x: model(to_torch(x), attention_mask=to_torch(ones(x))).logits.numpy()
