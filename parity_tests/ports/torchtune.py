"""torchtune's builder ``llama2``, which derives head_dim, as a backend.

Tested with torchtune 0.6.1, torchao 0.14.1 (0.17 lacks what its checkpointer imports) and torch
2.13.0 (``pip install torchtune torchao==0.14.1 torch==2.13.0``; 1.4 GB). Weights are mapped by its
own ``hf_to_tune``, which permutes q and k for its rotation of neighbouring pairs. The cache lies
in the module, of a fixed length, and is copied here. Of config.json ``FullModelHFCheckpointer``
reads the numbers of heads, hidden_size and head_dim; the rest its user states in the builder.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import llama2
from torchtune.training import FullModelHFCheckpointer, set_default_dtype

from reference_np.limits import Limits

from ..backends import torch_port
from .stated import called, lifted, stated_config

REQUIRES = ("torchtune==0.6.1", "torchao==0.14.1", "torch==2.13.0")
OBJECTS = ("Port", "Directory", "DirectoryWithHeads")
STATED = ("rms_norm_eps", "rope_", "tie_word_embeddings", "hidden_act")
CACHED = 320  # the length of the cache


class Positional(nn.Module):
    """torchtune's decoder, called with tokens, positions and mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.decoder = llama2(
            vocab_size=config.vocab_size,
            num_layers=config.n_layers,
            num_heads=config.n_heads,
            num_kv_heads=config.n_kv_heads,
            embed_dim=config.dim,
            max_seq_len=config.max_seq_len,
            intermediate_dim=config.hidden_dim,
            norm_eps=config.norm_eps,
            rope_base=config.rope_theta,
        )
        self.start = 0  # tokens in the cache

    def forward(self, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.decoder(tokens, mask=mask, input_pos=positions)


def renamed(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Return torchtune's parameters, by the names of Positional."""
    found = hf_to_tune(params, config.n_heads, config.n_kv_heads, config.dim)
    return {f"decoder.{name}": value for name, value in found.items()}


def built(config: Any, params: Any) -> Positional:
    module = Positional(config)
    found: Positional = torch_port.with_parameters(module, params, partial(renamed, config))
    return found


class Port:
    """``llama2(...)``, its RoPE and its KVCache."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim / n_heads",
        rope_types=("default",),
        tied=(False,),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    @torch.no_grad()
    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        inputs = (None if x is None else torch.from_numpy(x) for x in (tokens, positions, mask))
        with torch_port.lifted(params):
            return torch_port.to_numpy(built(config, params)(*inputs))

    @torch.no_grad()
    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        (batch, length), dtype = tokens.shape, torch.from_numpy(tokens).dtype

        def fresh() -> Positional:
            module = built(config, params)
            stored = next(module.parameters()).dtype
            module.decoder.setup_caches(batch, stored, decoder_max_seq_len=CACHED)
            return module

        with torch_port.lifted(params):
            module = torch_port.continued(cache, fresh)
            start, module.start = module.start, module.start + length
            given = torch.zeros(batch, length, CACHED, dtype=torch.bool)
            given[..., : start + length] = (
                torch.ones(length, start + length, dtype=torch.bool).tril(start)
                if mask is None
                else torch.from_numpy(mask)
            )
            at = torch.arange(start, start + length, dtype=dtype).expand(batch, -1)
            at = at if positions is None else torch.from_numpy(positions)
            return torch_port.to_numpy(module(torch.from_numpy(tokens), at, given)), module

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = built(config, params)
            return torch_port.loss_and_grads(
                module, params, batches, z_loss, lambda leaves: renamed(config, leaves)
            )


class Directory:
    """``FullModelHFCheckpointer``, and the builder with the other numbers of the directory."""

    dtypes = Port.dtypes
    limits = replace(Port.limits, masks="causal", positions="consecutive", cache="none")

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        config = stated_config(path)
        files = [file.name for file in Path(path).glob("*.safetensors")]
        with tempfile.TemporaryDirectory() as out, lifted(dtype):
            with set_default_dtype(getattr(torch, dtype)):
                decoder = Positional(config).decoder
            loader = FullModelHFCheckpointer(path, files, "LLAMA2", out)
            decoder.load_state_dict(loader.load_checkpoint()["model"])
        return called(decoder.eval(), dtype)


class DirectoryWithHeads(Directory):
    """The same with num_key_value_heads written out, which shows what else is read wrongly."""

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        file = Path(path, "config.json")
        heads = {"num_key_value_heads": stated_config(path).n_kv_heads}
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | heads))
        return super().from_directory(path, dtype)
