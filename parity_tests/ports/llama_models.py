"""Meta's llama-models: the Transformer of Llama 3.

Tested with llama-models 0.3.0, fairscale 0.4.13 and torch 2.13.0 (``pip install
llama-models==0.3.0 fairscale==0.4.13 torch==2.13.0``). It has no converter of Hugging Face's
weights: q and k are permuted here for its rotation of neighbouring pairs. The cache lies in the
module and is copied here. Its scaling of Llama 3.1 is of fixed numbers, and its calls keep no
graph.
"""

from functools import partial
from typing import Any

import fairscale.nn.model_parallel.initialize as parallel
import torch
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer
from torch import nn

from llama_parity.conversion.meta_names import meta_name
from reference_np.limits import Limits

from ..backends import torch_port
from ..backends.mixins import LogitsByDecode

REQUIRES = ("llama-models==0.3.0", "fairscale==0.4.13", "torch==2.13.0")
CACHED = 320  # the length of the cache


def args_of(config: Any, batch: int) -> ModelArgs:
    return ModelArgs(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=config.hidden_dim,  # what is below is rounded up to it
        ffn_dim_multiplier=(config.hidden_dim + 0.25) / int(8 * config.dim / 3),
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        max_batch_size=batch,
        max_seq_len=CACHED,
    )


class Started(nn.Module):
    """Meta's model, and the number of tokens in its cache."""

    def __init__(self, config: Any, batch: int) -> None:
        super().__init__()
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            parallel.initialize_model_parallel(1)
        self.llama = Transformer(args_of(config, batch))
        self.start = 0


def renamed(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Return Meta's parameters, by the names of Started."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    found = {}
    for name, value in params.items():
        if n_heads := heads.get(name.split(".")[-2]):
            halves = value.view(n_heads, 2, -1, value.shape[1])
            value = halves.transpose(1, 2).reshape(value.shape)
        found[f"llama.{meta_name(name)}"] = value
    if config.tie_embeddings:
        found["llama.output.weight"] = found["llama.tok_embeddings.weight"]
    return found


class Port(LogitsByDecode):
    """``Transformer`` on one process, with its cache."""

    dtypes = ("float64", "float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        positions="consecutive",
        rope_types=("default",),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        batch, length = tokens.shape

        def fresh() -> Started:
            module = Started(config, batch)
            found: Started = torch_port.with_parameters(module, params, partial(renamed, config))
            return found

        with torch_port.lifted(params):
            module = torch_port.continued(cache, fresh)
            out = module.llama(torch.from_numpy(tokens), module.start)
            module.start += length
            return torch_port.to_numpy(out), module
