"""tinygrad's Llama, which reads a GGUF file, as a backend.

Tested with tinygrad 0.13.0 and gguf 0.19.0 (``pip install tinygrad gguf``; 190 MB). 0.14.0 cannot
be imported: its wheel lacks ``tinygrad.llm.kernels``. Its own assembler for x86 compiles each
operation. With ``HALF=0`` it computes in float32. ``Scaled`` is a Llama 3.1, whose divisors of the
frequencies lie in the file.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"HALF": "0", "DEV": "CPU:X86"}

import numpy as np
from tinygrad import Tensor
from tinygrad.llm.model import Transformer

from reference_np.limits import Limits

from .gguf_file import write

REQUIRES = ("tinygrad==0.13.0", "gguf==0.19.0")
OBJECTS = ("Port", "Scaled")
MINUTES = 15.0
CONTEXT = 320  # the length of the cache


def load(config: Any, params: Any) -> Transformer:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        write(file.name, config, params, has_words=True)
        model, _ = Transformer.from_gguf(Tensor(Path(file.name).read_bytes()), CONTEXT)
    return model


class Port:
    """``Transformer.from_gguf``, its blocks and its cache."""

    dtypes = ("float32",)
    limits = Limits(
        masks="causal",
        positions="consecutive",
        cache="in place",
        rope_types=("default",),
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.decode(config, params, tokens, positions, mask, None)[0]

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        model, start = cache or (load(config, params), 0)
        x = model.token_embd(Tensor(tokens.astype(np.int32))).float()
        for block in model.blk:
            x = block(x, start)
        logits = model.output(model.output_norm(x)).numpy()
        return logits, (model, start + tokens.shape[1])


class Scaled:
    """The same with the rotary scaling of Llama 3.1, in logits alone."""

    dtypes = Port.dtypes
    example_fraction = 0.2
    limits = replace(Port.limits, cache="none", rope_types=("llama3",))
    logits = Port().logits
