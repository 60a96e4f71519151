"""transformers 5's reader of GGUF files, ``from_pretrained(..., gguf_file=...)``.

Tested with transformers 5.23.0, torch 2.13.0, accelerate 1.15.0 and gguf 0.19.0 (``pip install
transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 gguf==0.19.0``). The model is the one of the
row transformers_5; here it is made of a file as llama.cpp's converter writes it. ``Scaled`` is of
files with rotary scaling: keys of linear scaling, divisors of the frequencies for Llama 3.1's.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from reference_np.limits import Limits

from ..backends import torch_port
from .gguf_file import write

REQUIRES = ("transformers==5.23.0", "torch==2.13.0", "accelerate==1.15.0", "gguf==0.19.0")
OBJECTS = ("Port", "Scaled")
FILE = "model.gguf"


class Port:
    """``LlamaForCausalLM.from_pretrained`` of a file without scaling."""

    dtypes = ("float32",)
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="shifted",
        cache="none",
        rope_types=("default",),
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    @torch.no_grad()
    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            write(str(Path(folder, FILE)), config, params)
            model = LlamaForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
        at = None if positions is None else torch.from_numpy(positions)
        return torch_port.to_numpy(model.eval()(torch.from_numpy(tokens), position_ids=at).logits)


class Scaled(Port):
    """The same of files with rotary scaling, linear and of Llama 3.1."""

    limits = replace(Port.limits, rope_types=("linear", "llama3"))
