"""keras-hub's Llama on JAX as a backend.

Tested with keras-hub 0.32.0, keras 3.15.1 and jax 0.10.2 (``pip install keras-hub keras jax``; 2.9
GB, since keras-hub depends on TensorFlow). Weights are mapped by ``convert_llama3``, its converter
of Hugging Face directories. The cache is an array of a fixed length, returned by each call.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
# Each shape of each operation is compiled once, which takes longer than to run it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras
import ml_dtypes
import numpy as np
from keras_hub.models import Backbone, Llama3Backbone, LlamaCausalLM
from keras_hub.src.utils.transformers import convert_llama3

from reference_np.limits import Limits, real_tokens

REQUIRES = ("keras-hub==0.32.0", "keras==3.15.1", "jax==0.10.2")
OBJECTS = ("Port", "Linear", "Directory", "DirectoryWithEpsilon")
MINUTES = 25.0  # compiling
CACHED = 320  # the length of the cache
# The weights are all assigned; to draw random ones first would be compiled for each shape.
keras.initializers.RandomNormal.__call__ = lambda self, shape, dtype: np.zeros(shape, dtype)


class Loader:
    """The parameters, in place of keras-hub's reader of safetensors files."""

    def __init__(self, params: Any) -> None:
        self.params = params

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Any = None) -> None:
        value = self.params[hf_weight_key]
        shape = list(keras_variable.shape)
        keras_variable.assign(value if hook_fn is None else hook_fn(value, shape))


def built(config: Any, params: Any) -> LlamaCausalLM:
    scaling = {}
    if config.rope_type == "linear":
        scaling = {"rope_position_scaling_factor": config.rope_factor}
    if config.rope_type == "llama3":
        scaling = {
            "rope_frequency_adjustment_factor": config.rope_factor,
            "rope_low_freq_factor": config.rope_low_freq_factor,
            "rope_high_freq_factor": config.rope_high_freq_factor,
            "rope_pretraining_sequence_length": config.rope_original_max_seq_len,
        }
    backbone = Llama3Backbone(
        vocabulary_size=config.vocab_size,
        num_layers=config.n_layers,
        num_query_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        hidden_dim=config.dim,
        intermediate_dim=config.hidden_dim,
        rope_max_wavelength=config.rope_theta,
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        dtype=str(params["model.norm.weight"].dtype),
        **scaling,
    )
    convert_llama3.convert_weights(backbone, Loader(params), {})
    return LlamaCausalLM(backbone)


def to_numpy(tensor: Any) -> Any:
    array = keras.ops.convert_to_numpy(tensor)
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


class Port:
    """``LlamaCausalLM``: its forward pass and ``call_with_cache``."""

    dtypes = ("float32", "bfloat16", "float16")
    limits = Limits(
        head_dim="dim / n_heads",
        masks="right padding",
        positions="consecutive",
        rope_types=("default", "llama3"),
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        real = np.ones(tokens.shape, bool) if mask is None else real_tokens(mask)
        inputs = {"token_ids": tokens, "padding_mask": real.astype(np.int32)}
        return to_numpy(built(config, params)(inputs))

    def decode(
        self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Any, Any]:
        model, kind = built(config, params), str(params["model.norm.weight"].dtype)
        shape = (len(tokens), config.n_layers, 2, CACHED, config.n_kv_heads, config.head_dim)
        stored, start = (keras.ops.zeros(shape, kind), 0) if cache is None else cache
        logits, _, stored = model.call_with_cache(tokens, stored, start)
        return to_numpy(logits), (stored, start + tokens.shape[1])


class Linear(Port):
    """The same with linear scaling, by the argument ``rope_position_scaling_factor``."""

    dtypes = ("float32",)
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        rope_types=("linear",),
        float32_angles=("float32",),
    )
    decode: Any = None


class Directory:
    """``Backbone.from_preset``, its loader of Hugging Face directories."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim / n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32", "bfloat16", "float16"),
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        return self.called(path, dtype=dtype)

    def called(self, path: str, **given: Any) -> Callable[[Any], Any]:
        try:
            model = LlamaCausalLM(Backbone.from_preset(path, **given))
        except ValueError as error:
            if "valid llama3 config" in str(error):
                raise NotImplementedError("rope_scaling of another kind is refused") from error
            raise

        def logits(tokens: Any) -> Any:
            real = np.ones(tokens.shape, np.int32)
            return to_numpy(model({"token_ids": tokens, "padding_mask": real}))

        return logits


class DirectoryWithEpsilon(Directory):
    """The same with the file's epsilon as an argument, which shows what else is read wrongly."""

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        file = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        eps = file["rms_norm_eps"]
        return self.called(path, dtype=dtype, layer_norm_epsilon=eps)
