"""Optimum Intel: its export of a Hugging Face directory to OpenVINO, with a stateful cache.

Tested with optimum-intel 2.2.0, openvino 2026.4.1 and transformers 5.5.4, the newest that it takes
(``pip install optimum-intel nncf openvino torch==2.13.0``; 2 GB). ``OVModelForCausalLM`` exports
the directory, which the port writes for its weights, in float32 and runs it on the CPU plugin in
float32. The cache is a state of the model, which the next call without one forgets.
"""

from . import cuda_wheels  # noqa: F401

# isort: split
import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from optimum.intel import OVModelForCausalLM

from reference_np.limits import Limits, real_tokens

from ..conformance.directories import Form, write_directory

REQUIRES = (
    "optimum-intel==2.2.0",
    "openvino==2026.4.1",
    "nncf==3.4.0",
    "transformers==5.5.4",
    "torch==2.13.0",
    "torchvision==0.28.0",
)
VARIABLES = {"HF_HUB_OFFLINE": "1"}
MINUTES = 25.0
OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": "1",
}
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(path: str) -> Any:
    """Export a directory and compile it."""
    unheard = io.StringIO()
    with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        return OVModelForCausalLM.from_pretrained(path, export=True, ov_config=OPTIONS)


def forward(model: Any, tokens: Any, positions: Any = None, real: Any = None) -> Any:
    """Return the logits [B, T, V] of a new sequence in every row."""
    given = (None if x is None else torch.from_numpy(np.array(x)).long() for x in (positions, real))
    names = dict(zip(("position_ids", "attention_mask"), given, strict=True))
    return model(torch.from_numpy(tokens), **names).logits.numpy()


class Port:
    """Rows padded on either side; the state as the engine's cache."""

    dtypes = ("float32",)
    example_fraction = 0.2
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="padding",
        cache="engine",
        equal_rows=True,
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def model(self, config: Any, params: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            write_directory(Path(folder), config, params, Form())
            return load(folder)

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        real = None if mask is None else real_tokens(mask)
        return forward(self.model(config, params), tokens, positions, real)

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        self.running = self.model(config, params)
        self.state, self.length = None, 0
        return self.append(np.stack(rows))

    def append(self, tokens: Any) -> Any:
        before, self.length = self.length, self.length + tokens.shape[1]
        positions = torch.arange(before, self.length).repeat(len(tokens), 1)
        found = self.running(
            torch.from_numpy(tokens), past_key_values=self.state, position_ids=positions
        )
        self.state = found.past_key_values
        return found.logits[:, -1].numpy()


class Directory:
    """``OVModelForCausalLM.from_pretrained`` on a directory of Hugging Face."""

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
        return lambda tokens: forward(model, tokens)
