"""IBM's Foundation Model Stack: its LLaMA, its adapter of weights and its loader.

Tested with ibm-fms 1.13.1, transformers 5.23.0 and torch 2.13.0 (``pip install ibm-fms==1.13.1
transformers==5.23.0 torch==2.13.0``). Weights are mapped by its adapter ``hf``, which permutes
and joins q and k; the cache is a list of tensors, which a call does not change.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from fms.models import get_model
from fms.models.llama import LLaMA, LLaMAConfig
from fms.utils.serialization import get_adapted
from torch import nn

from llama_parity.comparison.float64 import LiftFloat32
from reference_np.limits import Limits

from ..backends import torch_port

REQUIRES = ("ibm-fms==1.13.1", "transformers==5.23.0", "torch==2.13.0")


def config_of(config: Any) -> LLaMAConfig:
    scaling = {
        "rope_type": "llama3",
        "factor": config.rope_factor,
        "low_freq_factor": config.rope_low_freq_factor,
        "high_freq_factor": config.rope_high_freq_factor,
        "original_max_position_embeddings": config.rope_original_max_seq_len,
    }
    return LLaMAConfig(
        src_vocab_size=config.vocab_size,
        emb_dim=config.dim,
        norm_eps=config.norm_eps,
        nheads=config.n_heads,
        kvheads=config.n_kv_heads,
        nlayers=config.n_layers,
        hidden_grow_factor=(config.hidden_dim + 0.5) / config.dim,  # rounded down to hidden_dim
        multiple_of=1,
        max_expected_seq_len=config.max_seq_len,
        tie_heads=config.tie_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling=scaling if config.rope_type == "llama3" else {},
    )


class Positional(nn.Module):
    """fms' model, called with tokens, positions and mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.llama = LLaMA(config_of(config))

    def forward(self, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.llama(tokens, position_ids=positions, mask=mask)


def renamed(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Return fms' parameters, by the names of Positional."""
    found = dict(get_adapted("llama", "hf", params, {"model_config": config_of(config)}))
    if config.tie_embeddings:
        found["head.weight"] = found["base_model.embedding.weight"]
    return {f"llama.{name}": value for name, value in found.items()}


def built(config: Any, params: Any) -> Positional:
    module = Positional(config)
    found: Positional = torch_port.with_parameters(module, params, partial(renamed, config))
    return found


class Port:
    """``LLaMA`` with scaled_dot_product_attention, ``sdpa_causal``."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim / n_heads",
        rope_types=("default", "llama3"),
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
        given = {} if positions is None else {"position_ids": torch.from_numpy(positions)}
        if mask is not None:
            given["mask"] = torch.from_numpy(mask)
        with torch_port.lifted(params):
            out, cache = built(config, params).llama(
                torch.from_numpy(tokens), past_key_value_states=cache, use_cache=True, **given
            )
            return torch_port.to_numpy(out), cache

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = built(config, params)
            return torch_port.loss_and_grads(
                module, params, batches, z_loss, partial(renamed, config)
            )


class Directory:
    """``get_model("hf_pretrained", model_path=...)``."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=Port.limits.float32_angles,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        def context() -> Any:
            return LiftFloat32() if dtype == "float64" else nullcontext()

        with context():
            model = get_model("hf_pretrained", model_path=path, data_type=dtype).eval()

        @torch.no_grad()
        def logits(tokens: Any) -> Any:
            with context():
                # with its cache: without one some lengths are wrong, which is not the loader's
                return torch_port.to_numpy(model(torch.from_numpy(tokens), use_cache=True)[0])

        return logits
