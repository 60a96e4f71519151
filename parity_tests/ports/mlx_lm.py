"""mlx_lm's Llama on MLX's processor backend, as a backend.

Tested with mlx 0.32.4 and mlx-lm 0.32.2 (``pip install "mlx[cpu]" mlx-lm``; 370 MB, on Linux
too). Weights are mapped by ``sanitize`` and ``load_weights``, the config by ``ModelArgs``. Its
BatchKVCache takes prompts padded on the left. A position is a float32 number and so is its
product with the frequency.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model

from reference_np.limits import Limits, real_tokens

REQUIRES = ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")
mx.set_default_device(mx.cpu)


def to_mlx(array: Any) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.astype(np.float32)).astype(mx.bfloat16)
    return mx.array(array)


def hugging_face(config: Any) -> dict[str, Any]:
    """Return config.json's keys."""
    scaling = {
        "rope_type": config.rope_type,
        "factor": config.rope_factor,
        "low_freq_factor": config.rope_low_freq_factor,
        "high_freq_factor": config.rope_high_freq_factor,
        "original_max_position_embeddings": config.rope_original_max_seq_len,
    }
    return {
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_scaling": None if config.rope_type == "default" else scaling,
    }


def built(config: Any, params: Any) -> Model:
    model = Model(ModelArgs.from_dict(hugging_face(config)))
    weights = model.sanitize({name: to_mlx(value) for name, value in params.items()})
    model.load_weights(list(weights.items()), strict=True)
    return model


class Port:
    """``mlx_lm.models.llama.Model`` with its caches."""

    dtypes = ("float32", "bfloat16", "float16")
    limits = Limits(
        masks="left padding",
        positions="consecutive",
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        model = built(config, params)
        if cache is not None:
            cache = copy.deepcopy(cache)
        elif mask is not None:
            padding = (~real_tokens(mask)).sum(axis=1).tolist()
            cache = [BatchKVCache(padding) for _ in range(config.n_layers)]
        else:
            cache = make_prompt_cache(model)
        logits = model(mx.array(tokens), cache=cache)
        return np.array(logits.astype(mx.float32)), cache

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        if mask is not None:
            return self.decode(config, params, tokens, positions, mask, None)[0]
        return np.array(built(config, params)(mx.array(tokens)).astype(mx.float32))


class Directory:
    """``mlx_lm.utils.load_model``, its loader of Hugging Face directories."""

    dtypes = Port.dtypes
    limits = Limits(
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        model, _ = load_model(Path(path))
        model.set_dtype(getattr(mx, dtype))
        return lambda tokens: np.array(model(mx.array(tokens)).astype(mx.float32))
