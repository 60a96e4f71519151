"""Google's Tunix: its Llama3 on JAX (flax.nnx), and its loader of safetensors.

Tested with google-tunix 0.1.7, flax 0.12.8 and jax 0.10.2 (``pip install google-tunix``; 1.6 GB).
Weights are mapped by the names and shapes of its loader, ``create_model_from_safe_tensors``, which
reads no config.json: the caller gives a ModelConfig, without rotary scaling. Positions and mask are
inputs, the cache is a value.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

# Each shape of each operation is compiled once, which takes longer than to run it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import LlamaConfig
from tunix.models.llama3 import params as llama3
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.safetensors_loader import path_to_key
from tunix.utils.torch_utils import torch_key_to_jax_key

from reference_np.limits import Limits

from . import jax_gradients

REQUIRES = ("google-tunix==0.1.7", "flax==0.12.8", "jax==0.10.2", "transformers==5.12.1")
MINUTES = 20.0  # compiling
CACHED = 320  # the length of the cache


def config_of(config: Any) -> ModelConfig:
    return ModelConfig(
        num_layers=config.n_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.n_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.n_kv_heads,
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        weight_tying=config.tie_embeddings,
    )


def built(config: Any, params: Any) -> Any:
    """Return the model with these parameters; differentiable in them."""
    given, found = config_of(config), {}
    mapping = llama3._get_key_and_transform_mapping(given)
    for name, value in params.items():
        key, transform = torch_key_to_jax_key(mapping, name)
        permuted = value if transform is None else value.transpose(transform[0])
        found[key] = permuted.reshape(transform[1]) if transform and transform[1] else permuted
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama3(given, rngs=nnx.Rngs(0))))
    named = jax.tree.map_with_path(lambda path, _: found[path_to_key(path)], state.to_pure_dict())
    return nnx.merge(graph, named)


@nnx.jit  # to compile it whole takes less time than its operations one by one
def called(model: Any, tokens: Any, positions: Any, mask: Any, cache: Any) -> Any:
    return model(tokens, positions, cache, mask)


def causal(length: int, start: int = 0) -> Any:
    return np.tril(np.ones((1, length, start + length), bool), start)


class Port:
    """``Llama3`` and its cache."""

    dtypes = ("float32", "bfloat16", "float16")
    limits = Limits(
        rope_types=("default",),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        length = tokens.shape[1]
        positions = np.arange(length)[None] if positions is None else positions
        mask = causal(length) if mask is None else mask
        model = built(config, {name: jnp.asarray(value) for name, value in params.items()})
        return np.array(called(model, tokens, positions, mask, None)[0].astype(jnp.float32))

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        rows, length = tokens.shape
        model = built(config, {name: jnp.asarray(value) for name, value in params.items()})
        if cache is None:
            shape = (rows, CACHED, config.n_kv_heads, config.head_dim)
            empty = jnp.zeros(shape, model.embedder.input_embedding.dtype)
            layer = {"k": empty, "v": empty, "end_index": jnp.zeros(rows, jnp.int32)}
            cache = {f"layer_{i}": layer for i in range(config.n_layers)}
        start = int(cache["layer_0"]["end_index"][0])
        positions = np.arange(start, start + length)[None] if positions is None else positions
        mask = causal(length, start) if mask is None else mask
        mask = np.pad(mask, ((0, 0), (0, 0), (0, CACHED - mask.shape[2])))
        logits, cache = called(model, tokens, positions, mask, cache)
        return np.array(logits.astype(jnp.float32)), cache

    def loss_and_grads(
        self, config: Any, params: Any, batches: Sequence[Any], z_loss: float
    ) -> tuple[float, Any]:
        def logits(leaves: Any, tokens: Any, positions: Any, mask: Any) -> Any:
            length = tokens.shape[1]
            positions = np.arange(length)[None] if positions is None else positions
            mask = causal(length) if mask is None else mask
            return built(config, leaves)(tokens, positions, None, mask)[0]

        return jax_gradients.loss_and_grads(logits, params, batches, z_loss)


class Directory:
    """``create_model_from_safe_tensors``, given the fields of config.json."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",  # which transformers' LlamaConfig requires
        masks="causal",
        positions="consecutive",
        cache="none",
        rope_types=("default",),
        float32_angles=Port.limits.float32_angles,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        given = LlamaConfig.from_pretrained(path)
        rope = given.rope_parameters
        if rope["rope_type"] != "default":
            raise NotImplementedError("ModelConfig has no rotary scaling")
        if given.hidden_act != "silu" or given.attention_bias or given.mlp_bias:
            raise NotImplementedError("ModelConfig has SiLU alone, and no biases")
        config = ModelConfig(
            num_layers=given.num_hidden_layers,
            vocab_size=given.vocab_size,
            embed_dim=given.hidden_size,
            hidden_dim=given.intermediate_size,
            num_heads=given.num_attention_heads,
            head_dim=given.head_dim,
            num_kv_heads=given.num_key_value_heads,
            rope_theta=rope["rope_theta"],
            norm_eps=given.rms_norm_eps,
            weight_tying=given.tie_word_embeddings,
        )
        model = llama3.create_model_from_safe_tensors(path, config, dtype=getattr(jnp, dtype))

        def logits(tokens: Any) -> Any:
            positions, mask = np.arange(tokens.shape[1])[None], causal(tokens.shape[1])
            return np.array(called(model, tokens, positions, mask, None)[0].astype(jnp.float32))

        return logits
