"""torchtitan's Llama 3, whose parameters its adapter maps from Hugging Face's.

Tested with torchtitan 0.3.0, triton 3.9.0 (it imports it) and torch 2.13.0 (``pip install
torchtitan==0.3.0 triton torch==2.13.0``). The attention is its ``ScaledDotProductAttention``, as
the others are compiled or for a GPU; q, k and v are joined, but for gradients. It trains: there
is no cache. Of a directory it reads the weights alone: a model is chosen among its own, or stated.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, Llama3StateDictAdapter, _build_llama3_layers

from reference_np.limits import Limits

from ..backends import torch_port
from .stated import called, lifted, stated_config

REQUIRES = ("torchtitan==0.3.0", "triton==3.9.0", "torch==2.13.0")
STATED = (
    "rms_norm_eps",
    "rope_",
    "tie_word_embeddings",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def config_of(config: Any, joined: bool) -> Llama3Model.Config:
    rope = ComplexRoPE.Config(
        dim=config.head_dim,
        max_seq_len=config.max_seq_len,
        theta=config.rope_theta,
        scaling="llama" if config.rope_type == "llama3" else "none",
        scaling_factor=config.rope_factor,
        low_freq_factor=config.rope_low_freq_factor,
        high_freq_factor=config.rope_high_freq_factor,
        original_max_position_embeddings=config.rope_original_max_seq_len,
    )
    norm = RMSNorm.Config(normalized_shape=config.dim, eps=config.norm_eps)
    layers = _build_llama3_layers(
        n_layers=config.n_layers,
        dim=config.dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        hidden_dim=config.hidden_dim,
        fuse_qkv=joined,
        rope=rope,
        attn_backend="flex",
    )
    inner = ScaledDotProductAttention.Config()
    return Llama3Model.Config(
        dim=config.dim,
        vocab_size=config.vocab_size,
        enable_weight_tying=config.tie_embeddings,
        tok_embeddings=Embedding.Config(num_embeddings=config.vocab_size, embedding_dim=config.dim),
        norm=norm,
        lm_head=Linear.Config(in_features=config.dim, out_features=config.vocab_size),
        layers=[
            replace(
                layer,
                attention=replace(layer.attention, inner_attention=inner),
                attention_norm=norm,
                ffn_norm=norm,
            )
            for layer in layers
        ],
    )


class Positional(nn.Module):
    """torchtitan's model, called with tokens, positions and no mask."""

    def __init__(self, config: Any, joined: bool) -> None:
        super().__init__()
        self.llama = Llama3Model(config_of(config, joined))

    def forward(self, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.llama(tokens, positions)


def renamed(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Return torchtitan's parameters, by the names of Positional."""
    adapter = Llama3StateDictAdapter(config_of(config, joined=False), None)
    return {f"llama.{name}": value for name, value in adapter.from_hf(dict(params)).items()}


def built(config: Any, params: Any, joined: bool = True) -> Positional:
    module = Positional(config, joined)
    found: Positional = torch_port.with_parameters(module, params, partial(renamed, config))
    return found


class Port:
    """``Llama3Model`` and its ComplexRoPE."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        rope_types=("default", "llama3"),
        cache="none",
        float32_angles=("float32", "bfloat16", "float16"),
    )

    @torch.no_grad()
    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        at = None if positions is None else torch.from_numpy(positions)
        with torch_port.lifted(params):
            return torch_port.to_numpy(built(config, params)(torch.from_numpy(tokens), at, None))

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = built(config, params, joined=False)
            return torch_port.loss_and_grads(
                module, params, batches, z_loss, partial(renamed, config)
            )


class Directory:
    """``initial_load_in_hf``: the adapter, and the reader of safetensors that it gives."""

    dtypes = Port.dtypes
    limits = Port.limits

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        about = config_of(stated_config(path), joined=True)
        with lifted(dtype):
            llama = Llama3Model(about)
        # As CheckpointManager.dcp_load: the tensors of the model's own names are read.
        kind = getattr(torch, dtype)
        empty = {name: torch.empty_like(x, dtype=kind) for name, x in llama.state_dict().items()}
        adapter = Llama3StateDictAdapter(about, path)
        weights = adapter.to_hf(empty)
        dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(path))
        llama.load_state_dict(adapter.from_hf(weights), assign=True)
        return called(llama.eval(), dtype)
