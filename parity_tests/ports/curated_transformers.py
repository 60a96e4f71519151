"""Explosion's Curated Transformers: LlamaCausalLM, and from_fsspec, its loader.

Tested with curated-transformers 2.0.1, safetensors 0.8.0, requests 2.34.2 (it imports both and
requires neither) and torch 2.13.0 (``pip install curated-transformers==2.0.1 safetensors requests
torch==2.13.0``). Weights are mapped by its ``state_dict_from_hf``; the cache is a value. A model
is brought to its precision by ``to``, as its own loader does, which rounds the tables of the
rotation too.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from curated_transformers.layers import Activation, AttentionMask
from curated_transformers.models import LlamaCausalLM, LlamaConfig
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file
from torch import nn

from llama_parity.comparison.float64 import LiftFloat32
from reference_np.limits import Limits, real_tokens

from ..backends import torch_port
from ..backends.mixins import LogitsByDecode

REQUIRES = (
    "curated-transformers==2.0.1",
    "safetensors==0.8.0",
    "requests==2.34.2",
    "torch==2.13.0",
)
OBJECTS = ("Port", "Directory", "DirectoryWithTorchDtype")


class Positional(nn.Module):
    """The package's model, called with tokens, positions and mask [B, S]."""

    def __init__(self, config: Any, params: Any) -> None:
        super().__init__()
        self.llama = LlamaCausalLM(
            LlamaConfig(
                activation=Activation.SiLU,
                hidden_width=config.dim,
                intermediate_width=config.hidden_dim,
                rms_norm_eps=config.norm_eps,
                n_query_heads=config.n_heads,
                n_hidden_layers=config.n_layers,
                n_key_value_heads=config.n_kv_heads,
                rotary_embedding_base=config.rope_theta,
                rotary_embedding_fraction=1.0,
                n_pieces=config.vocab_size,
            )
        )
        self.to(torch_port.to_torch(next(iter(params.values()))).dtype)
        torch_port.with_parameters(self, params, renamed)

    def forward(self, tokens: Any, positions: Any, mask: Any, **cache: Any) -> Any:
        start = cache["cache"][0].key.shape[2] if cache.get("cache") else 0
        if mask is None:
            mask = torch.ones(tokens.shape[0], start + tokens.shape[1], dtype=torch.bool)
        out = self.llama(tokens, AttentionMask(mask), positions=positions, **cache)
        return (out.logits, out.cache) if cache else out.logits


def renamed(params: dict[str, Any]) -> dict[str, Any]:
    """Return the package's parameters, by the names of Positional."""
    found = LlamaCausalLM.state_dict_from_hf(params)
    return {f"llama.{name}": value for name, value in found.items()}


class Port(LogitsByDecode):
    """``LlamaCausalLM``, its RoPE and its cache; padding is told by a mask [B, S]."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="padding",
        rope_types=("default",),
        tied=(False,),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    @torch.no_grad()
    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        real = None if mask is None else torch.from_numpy(real_tokens(mask))
        at = None if positions is None else torch.from_numpy(positions)
        with torch_port.lifted(params):
            module = Positional(config, params)
            out, cache = module(torch.from_numpy(tokens), at, real, cache=cache, store_cache=True)
            return torch_port.to_numpy(out), cache

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = Positional(config, params)
            return torch_port.loss_and_grads(module, params, batches, z_loss, renamed)


def rewrite(path: str, dtype: str, also_key: str | None = None) -> None:
    """Write a directory's tensors in ``dtype``, and its key, where they had one dtype."""
    file = Path(path, "config.json")
    config = json.loads(file.read_text())
    [key] = {"torch_dtype", "dtype"} & set(config)
    shards = {shard: load_file(shard) for shard in Path(path).glob("*.safetensors")}
    stored = {str(value.dtype) for weights in shards.values() for value in weights.values()}
    if f"torch.{config[key]}" not in stored:
        return
    keys = {key, also_key or key}
    file.write_text(json.dumps(config | dict.fromkeys(keys, dtype)))
    for shard, weights in shards.items():
        kind = getattr(torch, dtype)
        save_file({name: value.to(kind) for name, value in weights.items()}, shard)


class Directory:
    """``LlamaCausalLM.from_fsspec``, which wants the weights in the dtype of config.json.

    So a directory in which both are one is written anew in the dtype asked for: the tensors, and
    the key that tells it, ``torch_dtype`` of transformers 4 or ``dtype`` of transformers 5.
    """

    also_key: str | None = None
    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        tied=(False,),
        float32_angles=Port.limits.float32_angles,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        rewrite(path, dtype, self.also_key)
        context = LiftFloat32 if dtype == "float64" else nullcontext
        with context():
            model = LlamaCausalLM.from_fsspec(fs=LocalFileSystem(), model_path=path)
        model.eval()

        @torch.no_grad()
        def logits(tokens: Any) -> Any:
            mask = AttentionMask(torch.ones(tokens.shape, dtype=torch.bool))
            with context():
                return torch_port.to_numpy(model(torch.from_numpy(tokens), mask).logits)

        return logits


class DirectoryWithTorchDtype(Directory):
    """The same with the key ``torch_dtype`` in all, which shows what else is read wrongly."""

    also_key = "torch_dtype"
