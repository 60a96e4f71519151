"""CTranslate2's converter and Generator, a C++ engine that owns its cache, as a backend.

Tested with ctranslate2 4.8.5, transformers 5.23.0 and torch 2.13.0
(``pip install ctranslate2 transformers==5.23.0 torch==2.13.0``; ctranslate2 alone is 130 MB, its
converter needs the others). The weights go through ``LlamaLoader``, the converter of Llama
models, from a model of transformers in memory. ``static_prompt`` is the engine's cache: the
tokens so far, of one sequence at a time.
"""

import tempfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters.transformers import LlamaLoader, TransformersConverter
from transformers import LlamaConfig, LlamaForCausalLM

from reference_np.limits import Limits, real_tokens

REQUIRES = ("ctranslate2==4.8.5", "transformers==5.23.0", "torch==2.13.0")
transformers.logging.set_verbosity_error()
SPECIAL = ("<unk>", "<s>", "</s>")


def of_transformers(config: Any, params: Any) -> LlamaForCausalLM:
    """Return the model in transformers, which the converter reads."""
    scaling = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
    if config.rope_type != "default":
        scaling["factor"] = config.rope_factor
    if config.rope_type == "llama3":
        scaling["low_freq_factor"] = config.rope_low_freq_factor
        scaling["high_freq_factor"] = config.rope_high_freq_factor
        scaling["original_max_position_embeddings"] = config.rope_original_max_seq_len
    given = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=scaling,
    )
    model = LlamaForCausalLM(given)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in params.items()}
    model.load_state_dict(tensors, strict=not config.tie_embeddings)
    return model


def converted(config: Any, params: Any) -> ctranslate2.Generator:
    """Write the model in CTranslate2's format and load it."""
    names = [*SPECIAL, *map(str, range(config.vocab_size))][: config.vocab_size]
    tokenizer = SimpleNamespace(
        get_vocab=lambda: {name: i for i, name in enumerate(names)},
        bos_token=names[0],
        eos_token=names[-1],
        unk_token=names[0],
    )
    with torch.no_grad():
        spec = LlamaLoader()(of_transformers(config, params), tokenizer)
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        return ctranslate2.Generator(folder, intra_threads=1)


def forward(generator: ctranslate2.Generator, tokens: Any, lengths: Any) -> Any:
    """Return the logits [B, T, V] of rows padded on the right."""
    given = (ctranslate2.StorageView.from_array(np.array(x, np.int32)) for x in (tokens, lengths))
    return np.array(generator.forward_batch(*given))


class Port:
    """``forward_batch`` for logits, ``generate_batch`` with a static prompt as the engine."""

    dtypes = ("float32",)
    limits = Limits(
        head_dim="dim / n_heads",
        masks="right padding",
        positions="consecutive",
        cache="engine",
        rope_types=("default", "linear"),
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def logits(self, config: Any, params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
        lengths = [tokens.shape[1]] * len(tokens)
        if mask is not None:
            lengths = real_tokens(mask).sum(axis=1).tolist()
        return forward(converted(config, params), tokens, lengths)

    def start(self, config: Any, params: Any, rows: Sequence[Any]) -> Any:
        self.generator = converted(config, params)
        self.names = [*SPECIAL, *map(str, range(config.vocab_size))]
        self.rows = [[] for _ in rows]
        return self.append(rows)

    def append(self, tokens: Any) -> Any:
        found = []
        for row, new in zip(self.rows, tokens, strict=True):
            before, row[len(row) :] = [self.names[i] for i in row], new.tolist()
            result = self.generator.generate_batch(
                [[self.names[i] for i in new]],
                static_prompt=before or None,
                max_length=1,
                return_logits_vocab=True,
                include_prompt_in_result=False,
            )
            found.append(np.array(result[0].logits[0][0]))
        return np.stack(found)


class Directory:
    """``TransformersConverter``, its converter of Hugging Face directories."""

    dtypes = Port.dtypes
    limits = Limits(
        head_dim="dim a multiple of n_heads",
        masks="causal",
        positions="consecutive",
        cache="none",
        float32_angles=("float32",),
        float32_epsilon=True,
    )

    def from_directory(self, path: str, dtype: str) -> Callable[[Any], Any]:
        with tempfile.TemporaryDirectory() as folder:
            TransformersConverter(path).convert(f"{folder}/model")
            generator = ctranslate2.Generator(f"{folder}/model", intra_threads=1)
        return lambda tokens: forward(generator, tokens, [tokens.shape[1]] * len(tokens))
