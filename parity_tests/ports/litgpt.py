"""litgpt's GPT with a Llama's Config as a backend.

Tested with litgpt 0.5.13 and torch 2.13.0
(``pip install litgpt==0.5.13 torch==2.13.0``; 1.1 GB). Weights are mapped by
``copy_weights_hf_llama``, its converter, which joins q, k and v. The cache lies in the module, of a
fixed length, and is copied here; a position is its slot. Of a directory it reads the weights
alone: a model is chosen by its name among litgpt's, or stated.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from litgpt.config import name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint, copy_weights_hf_llama
from torch import nn

from reference_np.limits import Limits

from ..backends import torch_port
from .stated import called, lifted, stated_config

REQUIRES = ("litgpt==0.5.13", "torch==2.13.0")
STATED = (
    "rms_norm_eps",
    "rope_",
    "tie_word_embeddings",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
CACHED = 320  # the length of the cache


def config_of(config: Any) -> Config:
    scaling = {"factor": config.rope_factor}
    if config.rope_type == "llama3":
        scaling["low_freq_factor"] = config.rope_low_freq_factor
        scaling["high_freq_factor"] = config.rope_high_freq_factor
        scaling["original_max_seq_len"] = config.rope_original_max_seq_len
    return Config(
        block_size=config.max_seq_len,
        padded_vocab_size=config.vocab_size,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_query_groups=config.n_kv_heads,
        head_size=config.head_dim,
        n_embd=config.dim,
        intermediate_size=config.hidden_dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
        rope_base=config.rope_theta,
        rope_adjustments=None if config.rope_type == "default" else scaling,
    )


class Positional(nn.Module):
    """litgpt's model, called with tokens, positions and mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gpt = GPT(config_of(config))
        self.start = 0  # tokens in the cache

    def forward(self, tokens: Any, positions: Any, mask: Any) -> Any:
        return self.gpt(tokens, positions)


def renamed(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Return litgpt's parameters, by the names of Positional."""
    found: dict[str, Any] = {}
    joined: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    copy_weights_hf_llama(config_of(config), joined, found, params)
    return {f"gpt.{name}": value for name, value in found.items()}


def built(config: Any, params: Any) -> Positional:
    module = Positional(config)
    found: Positional = torch_port.with_parameters(module, params, partial(renamed, config))
    return found


class Port:
    """``GPT`` and its KVCache."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        masks="causal",
        positions="consecutive",
        float32_angles=("float32", "bfloat16", "float16"),
    )

    @torch.no_grad()
    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        with torch_port.lifted(params):
            return torch_port.to_numpy(built(config, params)(torch.from_numpy(tokens), None, None))

    @torch.no_grad()
    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        batch, length = tokens.shape

        def fresh() -> Positional:
            module = built(config, params)
            module.gpt.set_kv_cache(batch, CACHED, dtype=next(module.parameters()).dtype)
            return module

        with torch_port.lifted(params):
            module = torch_port.continued(cache, fresh)
            start, module.start = module.start, module.start + length
            at = torch.arange(start, start + length)
            return torch_port.to_numpy(module(torch.from_numpy(tokens), at, None)), module

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        with torch_port.lifted(params):
            module = built(config, params)
            return torch_port.loss_and_grads(
                module, params, batches, z_loss, lambda leaves: renamed(config, leaves)
            )


class Directory:
    """``convert_hf_checkpoint`` by a stated model's name, and ``Config.from_checkpoint``."""

    dtypes = Port.dtypes
    limits = replace(Port.limits, cache="none")

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        folder = Path(path)
        name_to_config["stated"] = asdict(config_of(stated_config(path))) | {"name": "stated"}
        convert_hf_checkpoint(folder, model_name="stated", dtype=dtype)
        weights = torch.load(folder / "lit_model.pth", weights_only=True)
        with lifted(dtype):
            gpt = GPT(Config.from_checkpoint(folder))
        gpt.load_state_dict(weights.get("model", weights), assign=True)
        return called(gpt.eval(), dtype)
