"""Ai2's OLMo-core: its llama_like Transformer.

Tested with ai2-olmo-core 3.0.0, transformers 5.23.0 and torch 2.13.0 (``pip install
ai2-olmo-core==3.0.0 transformers==5.23.0 torch==2.13.0``). Weights are mapped by name;
the order of q and k is Hugging Face's. Linear scaling is its position interpolation; Llama 3.1's
scaling it has in other parameters. Of a directory ``load_hf_model`` takes the weights, by
transformers; the model is stated by its user.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.hf import load_hf_model
from olmo_core.nn.rope import PIRoPEScalingConfig
from olmo_core.nn.transformer import TransformerConfig
from torch import nn

from reference_np.limits import Limits

from ..backends import torch_port
from .stated import called, lifted, stated_config

REQUIRES = ("ai2-olmo-core==3.0.0", "transformers==5.23.0", "torch==2.13.0")
STATED = (
    "rms_norm_eps",
    "rope_",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
NAMES = {
    "model.embed_tokens": "embeddings",
    "model.norm": "lm_head.norm",
    "lm_head.weight": "lm_head.w_out.weight",
    "model.layers": "blocks",
    "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k",
    "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_out",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}


class Positional(nn.Module):
    """OLMo-core's model, called with tokens alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        linear = config.rope_type == "linear"
        self.olmo = TransformerConfig.llama_like(
            d_model=config.dim,
            vocab_size=config.vocab_size,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            layer_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            rope_scaling=PIRoPEScalingConfig(factor=config.rope_factor) if linear else None,
            feed_forward=FeedForwardConfig(hidden_size=config.hidden_dim, bias=False),
            tie_word_embeddings=config.tie_embeddings,
        ).build(init_device="cpu")

    def forward(self, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.olmo(tokens)


def renamed(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Return OLMo-core's parameters, by the names of Positional."""
    found = {}
    for name, value in params.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[f"olmo.{name}"] = value
    if config.tie_embeddings:
        found["olmo.lm_head.w_out.weight"] = found["olmo.embeddings.weight"]
    return found


def built(config: Any, params: Any) -> Positional:
    module = Positional(config)
    found: Positional = torch_port.with_parameters(module, params, partial(renamed, config))
    return found


class Port:
    """``TransformerConfig.llama_like`` with PyTorch's attention."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        masks="causal",
        positions="consecutive",
        cache="none",
        rope_types=("default", "linear"),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    @torch.no_grad()
    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        with torch_port.lifted(params):
            return torch_port.to_numpy(built(config, params)(torch.from_numpy(tokens), None, None))

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = built(config, params)
            return torch_port.loss_and_grads(
                module, params, batches, z_loss, partial(renamed, config)
            )


class Directory:
    """``load_hf_model``, which takes the weights of transformers' model."""

    dtypes = Port.dtypes
    limits = replace(Port.limits, head_dim="dim a multiple of n_heads")  # transformers'

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        with lifted(dtype):
            olmo = Positional(stated_config(path)).olmo
        weights = olmo.state_dict()
        load_hf_model(path, weights)
        kind = getattr(torch, dtype)
        olmo.load_state_dict({name: x.to(kind) for name, x in weights.items()}, assign=True)
        return called(olmo.eval(), dtype)
