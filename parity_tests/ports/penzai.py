"""Penzai's Llama on JAX, and its converter once config._name_or_path is cleared.

Tested with penzai 0.2.5, jax 0.10.2, transformers 4.55.4 and torch 2.13.0 (``pip install
penzai==0.2.5 jax==0.10.2 transformers==4.55.4 torch==2.13.0``). Weights go through
``llamalike_from_huggingface_model``, its converter of transformers' models, which needs their
numbers alone; ``llama_from_huggingface_model`` refuses each key that it does not know, in words:
those of transformers 4.56 and later, tied embeddings, every scaling, and ``_name_or_path``, which
every model that is read from a folder has: it is cleared here, as its user must. Positions are an
input; ``KVCachingTransformerLM`` leaves padding out by an id.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

# Each shape of each operation is compiled once, which takes longer than to run it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax.numpy as jnp
import numpy as np
import torch
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.variants.llama import llama_from_huggingface_model
from penzai.models.transformer.variants.llamalike_common import llamalike_from_huggingface_model
from transformers import LlamaForCausalLM

from reference_np.limits import Limits, real_tokens

REQUIRES = ("penzai==0.2.5", "jax==0.10.2", "transformers==4.55.4", "torch==2.13.0")
MINUTES = 12.0  # compiling
CACHED, PADDING = 320, -1  # the length of the cache; the id of padding


def converted(config: Any, params: Any) -> Any:
    weights = {name: jnp.asarray(value) for name, value in params.items()}
    given = SimpleNamespace(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        num_hidden_layers=config.n_layers,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
    )
    dtype = f"torch.{params['model.norm.weight'].dtype}"
    of_transformers = SimpleNamespace(config=given, dtype=dtype, state_dict=lambda: weights)
    return llamalike_from_huggingface_model(of_transformers)


def named(array: Any) -> Any:
    return pz.nx.wrap(jnp.asarray(array, jnp.int32)).tag("batch", "seq")


@pz.variable_jit  # to compile it whole takes a fifth of the time of its operations
def called(model: Any, tokens: Any, given: dict[str, Any]) -> Any:
    return model(tokens, **given)


def to_numpy(logits: Any) -> Any:
    return np.array(logits.unwrap("batch", "seq", "vocabulary").astype(jnp.float32))


class Port:
    """``TransformerLM``, and ``KVCachingTransformerLM`` for its cache."""

    dtypes = ("float32", "bfloat16")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="padding",
        positions="shifted",
        cache="in place",
        rope_types=("default",),
        tied=(False,),
        float32_angles=("float32", "bfloat16"),
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        if mask is not None:
            return self.decode(config, params, tokens, positions, mask, None)[0]
        given = {} if positions is None else {"token_positions": named(positions)}
        return to_numpy(called(converted(config, params), named(tokens), given))

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> Any:
        model = cache or KVCachingTransformerLM.from_uncached(
            converted(config, params), CACHED, {"batch": len(tokens)}, pad_id=PADDING
        )
        if mask is not None:
            tokens = np.where(real_tokens(mask)[:, -tokens.shape[1] :], tokens, PADDING)
        return to_numpy(called(model, named(tokens), {})), model


class Directory:
    """transformers' ``from_pretrained``, and ``llama_from_huggingface_model``."""

    dtypes = Port.dtypes
    limits = replace(Port.limits, masks="causal", positions="consecutive", cache="none")

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        given = LlamaForCausalLM.from_pretrained(path, torch_dtype=getattr(torch, dtype))
        given.config._name_or_path = ""  # of every folder; refused like an unknown key
        try:
            model = llama_from_huggingface_model(given)
        except ValueError as error:
            if "does not support these configuration" in str(error):
                raise NotImplementedError(
                    "a key of config.json, which it refuses by name"
                ) from None
            raise
        return lambda tokens: to_numpy(called(model, named(tokens), {}))
